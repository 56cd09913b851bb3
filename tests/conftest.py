"""What all tests share: threads, seeds, no network, and the way to data that lies outside the project."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paqdetr.runs import Run
    from paqdetr.structures import Targets

REPO = Path(__file__).resolve().parents[1]

gc.disable()  # what is imported stays: looking through it again and again takes a quarter of the time of collecting tests

# Before torch, matplotlib or a hub client is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest-xdist fills the cores already; one thread a process then
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Tests kill processes, not machines: what they write need not have reached the disk before they go on.
os.fsync = lambda descriptor: None

# A shell starts what it runs in the background with Ctrl-C ignored, and processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no deadline: a first call may warm up a library, on a busy machine.
# `--hypothesis-profile=explore` looks for new examples.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Garbage is collected from here on, and not looked for among what has been imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  libraries draw from the global state
    torch.manual_seed(0)


@pytest.fixture
def kill_children() -> Callable[..., list[int]]:
    """`kill_children(pid)` kills what this process started; with `having`, one of those whose command has the word.

    Returns the ids of the killed, which are dead then. Processes end by themselves while they are looked through: Ray's do all
    the time.
    """
    import psutil

    def dead(process: psutil.Process) -> bool:
        """Gone, or left for its parent to be told of."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status() == psutil.STATUS_ZOMBIE
        return True

    def kill(pid: int, having: str | None = None) -> list[int]:
        killed = []
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if having is None or having in " ".join(child.cmdline()):
                    child.kill()
                    killed.append(child)
                    if having is not None:
                        break
        end = time.monotonic() + 60
        while not all(map(dead, killed)):
            assert time.monotonic() < end
            time.sleep(0.01)
        return [child.pid for child in killed]

    return kill


@pytest.fixture
def make_targets() -> Callable[..., list[Targets]]:
    """`make_targets(2, 0, 3)` is a batch of three images with so many boxes well inside them."""

    from paqdetr.structures import Targets

    def build(*counts: int, num_classes: int = 5) -> list[Targets]:
        targets = []
        for count in counts:
            sizes = 0.1 + 0.2 * torch.rand(count, 2)
            boxes = torch.cat([0.3 + 0.4 * torch.rand(count, 2), sizes], dim=1)
            targets.append(Targets(torch.randint(num_classes, (count,)), boxes))
        return targets

    return build


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("aquarium512")` is the folder of a data set outside the project; absent, the test skips.

    They are looked for in $PAQDETR_SHARED_DATA, or else in ../shared/data beside the checkout.
    """
    root = Path(os.environ.get("PAQDETR_SHARED_DATA", REPO.parent / "shared" / "data"))

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            pytest.skip(f"needs the data set {name!r}, which is not in {root}; set PAQDETR_SHARED_DATA to where it is")
        return path

    return folder


@pytest.fixture(scope="session")
def own_mounts() -> list[str]:
    """The words before a command that has mounts of its own; where the system does not let this process, the test skips."""
    words = ["unshare", "--mount"]
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("mounts file systems: needs unshare, which Linux has")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounts file systems: needs root with CAP_SYS_ADMIN ({error.stderr.strip()})")
    return words


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """`script("tools/docs.py")` is that file of the checkout as a module; in a source distribution, which is without
    `benchmarks` and `tools`, the test skips."""

    def load(file: str) -> ModuleType:
        path = REPO / file
        if not path.parent.is_dir():
            pytest.skip(f"needs a checkout: {path.parent.name}/ is not part of the source distribution")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # as for a script that is run: its neighbours can be imported
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module

    return load


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """Overrides that make a step of paq_dino_nano take some 20 ms, with a backbone of a tenth of its size."""
    return {
        "image_size": 96,
        "model.backbone": "test_resnet",
        "pretrained_backbone": False,
        "model.decoder_layers": 3,
        "model.dim": 32,
        "model.ffn_dim": 64,
        "model.num_queries": 20,
        "model.denoising_queries": 10,
        "batch_size": 4,
        "log_every": 1,
    }


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits of 96 px: 8 images to train on, 4 of each other split. Not to be changed by a test."""
    from paqdetr.data.digits import make_digits

    return make_digits(tmp_path_factory.mktemp("data") / "digits", size=96, train=8, val=4, test=4, max_objects=5)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path, tiny_settings: dict[str, Any]) -> Run:
    """The run of two epochs on `tiny_digits`, with everything a run writes. Not to be changed by a test."""
    from paqdetr.training import train

    output = tmp_path_factory.mktemp("runs") / "tiny"
    return train("paq_dino_nano", data=tiny_digits, output=output, device="cpu", epochs=2, settings=tiny_settings)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave out curves.png and predictions.png, which take longer than a tiny training itself."""
    from paqdetr.training import trainer

    for name in ("training_curves", "draw_predictions"):
        monkeypatch.setattr(trainer, name, lambda *args, **kwargs: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out the same to the last bit, whatever the machine does besides."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def chromium() -> str:
    """Where Chromium is; without it the tests skip, or fail if $PAQDETR_REQUIRE_CHROMIUM asks for it."""
    named = os.environ.get("PAQDETR_CHROMIUM")
    places = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    found = next((path for place in places if (path := shutil.which(place))), None)
    if found is None:
        reason = "needs Chromium: install it (apt-get install chromium), or name it in PAQDETR_CHROMIUM"
        if os.environ.get("PAQDETR_REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A running Chromium."""
    place = chromium()
    from playwright.sync_api import sync_playwright

    quiet = ("quic", "background-networking", "component-update", "sync", "gpu")
    arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=place, args=arguments)
        yield running
        running.close()
