"""The original weights outlive their conversion."""

from pathlib import Path

from paqdetr.cli import run


def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "dino.safetensors"
    source.write_bytes(b"mine")
    for place in (source, tmp_path):
        assert run(["convert", str(place), "--from", "dino", "--output", str(source), "--overwrite"]) == 2
        assert source.read_bytes() == b"mine"
