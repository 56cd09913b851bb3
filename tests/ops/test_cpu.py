"""numba's loops among threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from paqdetr.ops import compiled, cpu, ms_deform_attn
from paqdetr.ops.depthwise import weight_gradient

SHAPES = [(16, 20), (8, 10), (4, 5), (2, 3)]
SRC = Path(__file__).resolve().parents[2] / "src"


@pytest.fixture
def threads() -> Iterator[None]:
    """Sets the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_problem(seed: int = 0, queries: int = 425, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, 426, 4, 8, generator=random)
    locations = torch.rand(batch, queries, 4, 4, 3, 2, generator=random) * 1.4 - 0.2
    return value, locations, torch.rand(batch, queries, 4, 4, 3, generator=random)


def step(seed: int = 0, queries: int = 425, batch: int = 2) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x.requires_grad_() for x in random_problem(seed, queries, batch)]
    found = ms_deform_attn(inputs[0], SHAPES, inputs[1], inputs[2], "numba")
    return [found.detach(), *torch.autograd.grad(found.square().sum(), inputs)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("threads")
def test_the_same_bits_with_any_number_of_threads(batch: int) -> None:
    torch.set_num_threads(1)
    expected = step(batch=batch)
    for count in (2, 3, 8, 64):
        torch.set_num_threads(count)
        for _ in range(3):
            assert equal(step(batch=batch), expected)


@pytest.mark.parametrize(("batch", "count"), [(1, 1), (3, 1), (1, 2), (2, 4), (1, 64)])
def test_parts_of_the_gradient_cover_it_once(batch: int, count: int) -> None:
    heads, levels, points = 4, 4, 3
    used = torch.zeros(batch, heads, levels * points)
    parts = cpu._parts(batch, heads, levels, points, count)
    for image, first_head, last_head, first_point, last_point in parts:
        used[image, first_head:last_head, first_point:last_point] += 1
        assert first_point % points == last_point % points == 0, "a level has two owners"
    assert (used == 1).all()
    assert len(parts) >= min(count, batch * heads * levels)


@pytest.mark.usefixtures("threads")
def test_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    expected = [step(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        torch.set_num_threads(2)  # a setting of the thread
        wrong.extend(seed for _ in range(10) if not equal(step(seed), expected[seed]))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong


def test_the_callers_defaults_are_not_those_of_results() -> None:
    """The loops write to addresses: a result of another type or device would be other memory."""
    expected = step(queries=50)
    random = [x.requires_grad_() for x in random_problem(queries=50)]
    x, gradient = (torch.randn(1, 70, 6, 6).contiguous(memory_format=torch.channels_last) for _ in range(2))
    of_weights = weight_gradient(x, gradient, (5, 5), 1, 2, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = ms_deform_attn(random[0], SHAPES, random[1], random[2], "numba")
            again = [found.detach(), *torch.autograd.grad(found.square().sum(), random)]
            assert torch.equal(weight_gradient(x, gradient, (5, 5), 1, 2, 1), of_weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(again, expected)


def test_no_points_are_no_sum() -> None:
    value, locations, weights = random_problem(queries=3)
    found = ms_deform_attn(value, SHAPES, locations[..., :0, :], weights[..., :0], "numba")
    assert found.shape == (2, 3, 32) and (found == 0).all()


class Attended(Dataset[Tensor]):
    """Attention as part of what a loader's worker does."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)
        return step(index, queries=50)[1]


# numba's own threads would end a forked process here, or hang it.
@pytest.mark.integration
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("threads")
def test_workers_of_a_loader(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    torch.set_num_threads(2)
    expected = [step(index, queries=50)[1] for index in range(4)]  # the parent's pool has threads now
    loader = DataLoader(
        Attended(),
        batch_size=None,
        num_workers=2 if method == "fork" else 1,
        multiprocessing_context=method,
        timeout=120,
    )
    assert equal(list(loader), expected)


SCRIPT = """
import sys, torch
torch.set_num_threads(2)
from paqdetr.ops import backends_run, ms_deform_attn
torch.manual_seed(0)
inputs = [torch.randn(1, 26, 2, 8), torch.rand(1, 3, 2, 2, 2, 2), torch.rand(1, 3, 2, 2, 2)]
inputs = [x.requires_grad_() for x in inputs]
found = ms_deform_attn(inputs[0], [(4, 5), (2, 3)], inputs[1], inputs[2])
found.sum().backward()
auto = [found.detach()] + [x.grad.clone() for x in inputs]
for x in inputs:
    x.grad = None
found = ms_deform_attn(inputs[0], [(4, 5), (2, 3)], inputs[1], inputs[2], "reference")
found.sum().backward()
for x, y in zip(auto, [found] + [x.grad for x in inputs]):
    torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
print(backends_run()[0], "numba" in sys.modules, "torch._dynamo" in sys.modules)
"""


def run(script: str = SCRIPT, **environment: str) -> subprocess.Popen[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    variables |= {"PYTHONPATH": str(SRC), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.mark.integration
def test_no_compiler_is_needed(tmp_path: Path) -> None:
    """In two processes at once that share an empty cache; the second time it is read from there, without numba."""
    nothing = tmp_path / "bin"
    nothing.mkdir()
    environment = {"PATH": str(nothing), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for process in [run(**environment) for _ in range(2)]:
        # Nor torch's, whose import takes a second.
        assert output_of(process).split() == ["numba", "True", "False"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.o")}
    assert len(kept) == 3
    assert output_of(run(**environment)).split() == ["numba", "False", "False"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.o")} == kept


@pytest.mark.integration
def test_a_process_without_numba() -> None:
    script = "import sys; sys.modules['numba'] = None; sys.modules['llvmlite'] = None\n" + SCRIPT
    assert output_of(run(script)).split()[0] == "reference"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the machine code of `step`. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("kept") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(folder))
        compiled._kernel.cache_clear()
        step(queries=50)
    return folder


@pytest.mark.parametrize(
    "what", ["kept", "damaged", "cut short", "nowhere to keep it", "not what a process without numba has"]
)
def test_kept_code_computes_the_same_bits(
    what: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step(queries=50)
    folder = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    if what == "nowhere to keep it":
        folder.write_bytes(b"a file")
    elif what.startswith("not"):
        monkeypatch.setattr(compiled, "_object", lambda found: None)
    else:
        shutil.copytree(kept, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*.o")}
    for file, code in before.items():
        if what == "damaged":
            file.write_bytes(code[:-9] + bytes(9))
        if what == "cut short":
            file.write_bytes(code[:20])
    written = {file: file.stat().st_mtime_ns for file in before}
    compiled._kernel.cache_clear()
    assert equal(step(queries=50), expected)
    assert compiled.is_any_kept() == (what in ("kept", "damaged", "cut short"))
    assert len(list(folder.rglob("*.o"))) == len(before) == (3 if compiled.is_any_kept() else 0)
    anew = {file for file, when in written.items() if file.stat().st_mtime_ns != when}
    assert anew == (set() if what == "kept" else set(before))
