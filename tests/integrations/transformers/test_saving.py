"""Models with PaQ through save_pretrained, from_pretrained and the Trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

pytest.importorskip("transformers")

import transformers

from paqdetr.errors import CheckpointError, ConfigError
from paqdetr.integrations.transformers import OneToManyUntil, attach, detach, from_pretrained

pytestmark = pytest.mark.integration

Make = Callable[..., Any]
Batch = dict[str, Any]


def detect(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"]).logits


def trained(model: Any) -> Any:
    """As after a training: nothing of PaQ has the value it starts with."""
    with torch.no_grad():
        for parameter in model.paq.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


# --- files


def test_saved_and_loaded_it_gives_the_same(kind: str, make_host: Make, batch: Batch, tmp_path: Path) -> None:
    model = trained(attach(make_host(kind), num_patterns=8, min_positives=2))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.paq.settings == model.paq.settings
    state, saved = loaded.state_dict(), model.state_dict()
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in saved)
    # Tensors that stand elsewhere in memory are added in another order.
    torch.testing.assert_close(detect(loaded, batch), detect(model, batch), atol=2e-6, rtol=0)
    loaded.train()(**batch)
    assert min(loaded.paq.positives_per_box) >= 2
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(
        detect(detach(from_pretrained(tmp_path)), batch), detect(plain, batch), atol=2e-6, rtol=0
    )
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert load_file(again / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


def test_files_say_what_is_in_them(make_host: Make, tmp_path: Path) -> None:
    model = attach(make_host("rt"), num_patterns=8)
    model.save_pretrained(tmp_path)
    marker = json.loads((tmp_path / "config.json").read_text())["paq"]
    assert marker["num_patterns"] == 8 and marker["assigner"] == "quality_aware" and marker["version"]
    tensors = load_file(tmp_path / "model.safetensors")
    own = {name for name in tensors if name.startswith("paq.")}
    assert own == {f"paq.{name}" for name in model.paq.state_dict()}
    detach(model)
    model.save_pretrained(tmp_path / "plain")
    assert "paq" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == tensors.keys() - own


def test_plain_transformers_drops_the_patterns_and_ours_says_so(
    make_host: Make, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained(attach(make_host("rt"), num_patterns=8))
    model.save_pretrained(tmp_path)
    plain, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {f"paq.{name}" for name in model.paq.state_dict()}
    assert not torch.allclose(detect(plain, batch), detect(model, batch), atol=1e-3)
    with pytest.raises(ConfigError, match="was saved with PaQ") as caught:
        attach(plain)
    assert "from_pretrained" in caught.value.remedy
    del plain.config.paq
    attach(plain)  # with new patterns
    with caplog.at_level(logging.WARNING):
        from_pretrained(tmp_path)
    assert "RTDetrForObjectDetection.from_pretrained of transformers would leave out" in caplog.text


def test_options_of_transformers_are_passed_on(make_host: Make, batch: Batch, tmp_path: Path) -> None:
    model = trained(attach(make_host("rt"), num_patterns=8))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = from_pretrained(tmp_path, dtype=torch.bfloat16, local_files_only=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(loaded.paq.queries.patterns, model.paq.queries.patterns.bfloat16())
    other = from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, dtype=torch.bfloat16, local_files_only=True
    )
    assert other.config.num_labels == 7 and detect(other.float(), batch)[0].shape[-1] == 7
    assert torch.equal(other.paq.queries.patterns, loaded.paq.queries.patterns.float())
    named = from_pretrained(tmp_path, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True)
    assert named.config.num_labels == 2 and {p.dtype for p in named.parameters()} == {torch.float32}


def test_mistakes(make_host: Make, tmp_path: Path) -> None:
    make_host("rt").save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"plain: its config\.json has no 'paq'") as caught:
        from_pretrained(tmp_path / "plain")
    assert "attach(model)" in caught.value.remedy

    attach(make_host("rt"), num_patterns=8).save_pretrained(tmp_path / "holed")
    file = tmp_path / "holed" / "model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if name != "paq.queries.patterns"}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holed: 1 tensors .*'paq.queries.patterns'"):
        from_pretrained(tmp_path / "holed")

    config = tmp_path / "holed" / "config.json"
    values = json.loads(config.read_text())
    values["paq"]["num_pattern"] = values["paq"].pop("num_patterns")
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"holed: config\.json: unknown setting 'num_pattern'") as caught:
        from_pretrained(tmp_path / "holed")
    assert "num_patterns" in caught.value.remedy

    values["paq"]["num_patterns"] = values["paq"].pop("num_pattern")
    values["architectures"] = ["DetrForObjectDetection"]
    config.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="DetrForObjectDetection"):
        from_pretrained(tmp_path / "holed")


@pytest.mark.parametrize("key", ["num_queries", "num_patterns"])
def test_patterns_of_another_shape_do_not_start_anew(key: str, make_host: Make, tmp_path: Path) -> None:
    """transformers would leave the patterns uninitialised, or initialise their network as its own layers."""
    attach(make_host("rt"), num_patterns=8).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    (values if key == "num_queries" else values["paq"])[key] = 12
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"tensors of PaQ have another shape, such as 'paq\.queries\.") as caught:
        from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert "resize" in caught.value.remedy


# --- the Trainer


class TwoScenes(Dataset):
    def __init__(self, batch: Batch, length: int = 2) -> None:
        self.batch, self.length = batch, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index % 2] for name, value in self.batch.items()}


def collate(rows: list[dict[str, Any]]) -> Batch:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "pixel_mask")}
    return stacked | {"labels": [row["labels"] for row in rows]}


def trainer_of(model: Any, batch: Batch, folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callbacks = changes.pop("callbacks", [])
    arguments = transformers.TrainingArguments(**(settings | changes))
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=TwoScenes(batch),
        eval_dataset=TwoScenes(batch),
        data_collator=collate,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("trained_kind", ["deformable", "conditional", "rt", "d-fine"])
def test_the_trainer_trains_and_saves_it(trained_kind: str, make_host: Make, batch: Batch, tmp_path: Path) -> None:
    model = attach(make_host(trained_kind), num_patterns=8, min_positives=2)
    before = {name: x.clone() for name, x in model.paq.state_dict().items()}
    trainer = trainer_of(model, batch, tmp_path)
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    after = model.paq.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in ("gate", "queries.patterns"))
    loaded = from_pretrained(tmp_path / "checkpoint-2")
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())


def test_a_training_resumes_with_its_patterns(make_host: Make, batch: Batch, tmp_path: Path) -> None:
    """DAB-DETR, since the Trainer does not restore tensors that transformers renames when it saves, and the others have such."""
    straight = attach(make_host("dab"), num_patterns=8)
    trainer_of(straight, batch, tmp_path, max_steps=4).train()
    torch.manual_seed(5)  # the patterns come from the checkpoint, not from the model that is handed over
    resumed = attach(make_host("dab"), num_patterns=8)
    trainer = trainer_of(resumed, batch, tmp_path, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in straight.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=2e-5, rtol=1e-4, msg=name)


def test_one_to_many_ends_where_it_was_told_to(make_host: Make, batch: Batch, tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(bool(model.paq.positives_per_box))

    model = attach(make_host("rt"), num_patterns=8)
    trainer_of(model, batch, tmp_path, max_steps=4, callbacks=[OneToManyUntil(0.5), Look()]).train()
    assert seen == [True, True, False, False]
    with pytest.raises(ConfigError, match="no PaQ attached"):
        trainer_of(detach(model), batch, tmp_path, callbacks=[OneToManyUntil(0.5)]).train()
    with pytest.raises(ValueError, match="share"):
        OneToManyUntil(1.5)
