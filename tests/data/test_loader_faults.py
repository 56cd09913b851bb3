"""Loading where the system lacks something: room in /dev/shm, a folder for temporary files. Each with a mount of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from paqdetr.data.digits import make_digits

pytestmark = pytest.mark.integration

# Six images of 800x800 are 46 MB; a container has 64 MB of /dev/shm.
LOAD = """
import logging, os, shutil, sys, tempfile
from paqdetr.config import load_config
from paqdetr.data.dataset import open_split
from paqdetr.data.loader import training_loader
from paqdetr.preprocessing import Normalization, Preprocessing

if "TMPDIR" in os.environ:  # the folder is chosen, then it goes
    shutil.rmtree(tempfile.gettempdir())
logging.basicConfig(format="%(message)s")
config = load_config("paq_dino_nano", {"batch_size": 6, "workers": int(sys.argv[2]), "augment.scale": [1.0, 1.0]})
preprocessing = Preprocessing(image_size=800, size_divisor=1, normalization=Normalization((0.0,) * 3, (1.0,) * 3))
loader, _ = training_loader(config, open_split(sys.argv[1], "train"), preprocessing)
for batch in loader:
    print(tuple(batch.images.shape), float(batch.images.double().sum()), [len(t) for t in batch.targets])
"""  # the loader is not closed: workers must not keep a program from its end


@pytest.fixture(scope="module")
def load(
    tmp_path_factory: pytest.TempPathFactory, own_mounts: list[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`load(mounts, workers)` loads an epoch where these shell commands have been run before, in mounts of its own."""
    data = make_digits(tmp_path_factory.mktemp("data") / "digits", size=96, train=30, val=1, test=1)

    def loaded(mounts: str, *, workers: int = 2) -> subprocess.CompletedProcess[str]:
        command = f'{mounts}; exec "$@"'
        program = [sys.executable, "-c", LOAD, str(data), str(workers)]
        return subprocess.run(
            [*own_mounts, "sh", "-ec", command, "sh", *program],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    return loaded


@pytest.fixture(scope="module")
def expected(load: Callable[..., subprocess.CompletedProcess[str]]) -> str:
    """What is printed where nothing is missing."""
    done = load("true", workers=0)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 5
    return done.stdout


SHM = "mount -t tmpfs -o size={} tmpfs /dev/shm"
FAULTS = {
    "64 MB of /dev/shm": (SHM.format("64m"), "batches of 46 MB come through pipes"),
    "no room in /dev/shm": (SHM.format("4k"), "No space left on device): workers=0"),
    "read-only /dev/shm": (SHM.format("1m,ro"), "Read-only file system): workers=0"),
    "no folder for temporary files any more": ("export TMPDIR=$(mktemp -d)", "No such file or directory"),
}


@pytest.mark.parametrize(("mounts", "words"), FAULTS.values(), ids=FAULTS)
def test_the_batches_are_the_same_whatever_is_missing(
    load: Callable[..., subprocess.CompletedProcess[str]], expected: str, mounts: str, words: str
) -> None:
    found = load(mounts)
    assert (found.returncode, found.stdout) == (0, expected), found.stderr
    assert found.stderr.count("\n") == 1 and words in found.stderr
