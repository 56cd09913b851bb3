"""Trained detectors for other programs: ONNX, OpenVINO, pt2 and TorchScript, each held against the model before it is kept."""

from paqdetr.deploy.export import Export, export

__all__ = ["Export", "export"]
