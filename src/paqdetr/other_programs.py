"""Words of ultralytics, rf-detr, detectron2, mmdetection, transformers and the DETR codes for what has another name here."""

from __future__ import annotations

from collections.abc import Collection

_OWN_PRECISION = "evaluation and prediction run in the precision of the model's weights"

WORDS = {
    # where things are
    "data": "DIR|SRC|--calibrate", "model": "MODEL", "arch": "MODEL",
    "config": "MODEL", "config_file": "MODEL", "cfg": "MODEL", "model_name": "MODEL",
    "model_name_or_path": "MODEL", "checkpoint": "init=|MODEL", "ckpt": "init=|MODEL", "weights": "init=|MODEL",
    "load_from": "init=|MODEL", "model.weights": "init=|MODEL", "pretrain_weights": "init=|MODEL",
    "source": "SOURCE", "input": "SOURCE", "image": "SOURCE", "images": "SOURCE", "image_path": "SOURCE",
    "dataset": "--data", "data_dir": "--data", "data_path": "--data", "dataset_dir": "--data", "dataset_name": "--data",
    "data_root": "--data", "coco_path": "--data", "dataset_file": "--data",
    "output_dir": "--output", "out_dir": "--output", "out": "--output", "work_dir": "--output", "save_dir": "--output",
    "project": "--output", "name": "--output", "outdir": "--output",
    # training
    "epoch": "epochs=", "num_epochs": "epochs=", "max_epochs": "epochs=", "num_train_epochs": "epochs=",
    "max_iter": "max_steps=", "iters": "max_steps=", "steps": "max_steps=", "solver.max_iter": "max_steps=",
    "batch": "--batch-size|batch_size=", "bs": "--batch-size|batch_size=", "batchsize": "--batch-size|batch_size=",
    "batch_size": "--batch-size|--batch|batch_size=",
    "per_device_train_batch_size": "batch_size=", "samples_per_gpu": "batch_size=", "train_batch_size": "batch_size=",
    "solver.ims_per_batch": "batch_size=", "per_device_eval_batch_size": "--batch-size",
    **dict.fromkeys(("imgsz", "img_size", "size", "resolution", "input_size", "image_size"),
                    "--image-size|image_size=|*evaluation and prediction use the model's own image size"),
    "img": "--image-size|image_size=|SOURCE",
    "lr0": "lr=", "learning_rate": "lr=", "base_lr": "lr=", "solver.base_lr": "lr=", "lr_backbone": "backbone_lr=",
    "lr_encoder": "backbone_lr=", "lr_scheduler": "schedule=", "lr_scheduler_type": "schedule=", "cos_lr": "schedule=cosine",
    "grad_accum_steps": "accumulate=", "gradient_accumulation_steps": "accumulate=", "accum": "accumulate=",
    "clip_max_norm": "clip_norm=", "max_grad_norm": "clip_norm=", "clip_grad": "clip_norm=", "wd": "weight_decay=",
    "num_workers": "workers=", "dataloader_num_workers": "workers=", "dataloader.num_workers": "workers=",
    "hidden_dim": "model.dim=", "enc_layers": "model.encoder_layers=", "dec_layers": "model.decoder_layers=",
    "nheads": "model.num_heads=", "queries": "model.num_queries=", "fliplr": "augment.flip=", "hsv": "augment.color=",
    "cache": "*images are cached anyway, and cache_images=GIB says how many",
    "random_seed": "--seed", "fp16": "--amp fp16", "bf16": "--amp bf16",
    "gradient_checkpointing": "checkpoint_activations=true", "use_checkpoint": "checkpoint_activations=true",
    "auto_scale_lr": "lr_rule=linear", "sync_bn": "sync_batch_norm=true", "early_stopping": "patience=10",
    "early_stopping_patience": "patience=", "ema": "ema_decay=0.9998", "use_ema": "ema_decay=0.9998",
    "save_steps": "save_every_steps=", "logging_steps": "log_every=", "eval_interval": "eval_every=", "report_to": "trackers=",
    **dict.fromkeys(("freeze", "freeze_at", "frozen_stages", "freeze_backbone", "model.backbone.freeze_at"),
                    "*model.frozen_stride=8 freezes the backbone up to its feature of stride 8"),
    **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v"), "*augment.color=0.2 varies brightness, contrast and saturation"),
    **dict.fromkeys(("warmup_epochs", "warmup_ratio"), "*warmup_steps=N is counted in steps"),
    **dict.fromkeys(("close_mosaic", "mixup", "cutmix", "copy_paste", "degrees", "shear", "translate", "perspective", "flipud",
                     "bgr", "erasing", "auto_augment", "lrf", "momentum", "warmup_momentum", "warmup_bias_lr",
                     "fraction", "line_width"), "*nothing here does the same"),
    **dict.fromkeys(("single_cls", "agnostic_nms"), "!nothing here does the same"),
    # detections and exported files
    "conf": "--threshold", "conf_thres": "--threshold", "confidence": "--threshold", "score_thr": "--threshold",
    "confidence_threshold": "--threshold", "score_threshold": "--threshold", "box_threshold": "--threshold",
    "iou": "--nms", "iou_thres": "--nms", "iou_threshold": "--nms", "nms_threshold": "--nms",
    "max_det": "--max-detections", "max_dets": "--max-detections", "vid_stride": "--every", "stride": "--every",
    "save_txt": "--save draw,yolo", "save_json": "--save draw,coco", "save_crop": "--save draw,crops",
    "half": f"--precision f16|--amp fp16|!{_OWN_PRECISION}",
    "int8": f"--precision int8|!{_OWN_PRECISION}", "dtype": "--precision",
    "slice": "--tiles", "tile": "--tiles",
    "device": "--device|*paqdetr.load(path, device=...) chooses where a model runs",
    "stream": "!model.stream(source) gives detections one at a time",
    "subset": "--split", "set": "--split", "ann_file": "--annotations", "annotation": "--annotations",
    "gpu": "--device", "gpu_id": "--device", "gpus": "GPUS", "num_gpus": "GPUS", "ngpus": "GPUS", "devices": "GPUS",
    "exist_ok": "--overwrite|*", "force": "--overwrite|",
    "last": "--resume", "auto_resume": "--resume", "resume_from": "--resume",
    # part of the verb here, or always done
    "task": "*", "mode": "*", "launcher": "*", "local_rank": "*", "pretrained": "init=|MODEL", "verbose": "*", "plots": "*",
    "simplify": "*", "optimizer": "*the optimizer is AdamW", "opt": "*the optimizer is AdamW",
    "num_classes": "*classes are those of the data", "nc": "*classes are those of the data",
    "val": "*the setting eval_every says when the val split is evaluated", "opset": "*ONNX files have opset 18",
    "dynamic": "*--batch N fixes how many images a call takes; any number if not given",
    "cfg_options": "", "opts": "", "do_train": "", "do_eval": "", "evaluate": "", "show": "", "save": "",
}  # fmt: skip
"""Options and keys of other programs, with _ for -, and the place of their value here: an option ("--data"), a setting ("lr="),
the first argument (MODEL) or another one (SOURCE, DIR, SRC); of several with | between them the first that a verb has.
"--amp fp16" and "schedule=cosine" stand for words that are on or off; "" leaves a word out, "*" its value as well; what
follows "*" is said of it, as what follows "!", which leaves out a word that may have no value. GPUS: how many, or which."""

SWITCHES = ("pretrained",)
"""Words that may also be on or off, and are left out then."""


def what_to_write(word: str, arguments: Collection[str] | None = None) -> str | None:
    """Advice on a keyword of another program in Python; None if the table has no word on it.

    Args:
        word: such as "batch".
        arguments: of the function that was called; None: it takes settings.
    """
    word = word.lower().replace("-", "_")
    places = WORDS.get(word, WORDS.get(word.removeprefix("model."), "")).split("|")
    for place in places:
        argument = place.removeprefix("--").replace("-", "_")
        if place[:1] in ("!", "*") and place[1:]:
            # A training has an option for it, which is no setting, and what is said is of other verbs.
            option = arguments is None and places[0].startswith("--")
            return None if option else f"leave it out: {place[1:]}"
        if "=" in place if arguments is None else place.startswith("--") and argument in arguments:
            return f"write {place if arguments is None else f'{argument}='} instead"
    return None
