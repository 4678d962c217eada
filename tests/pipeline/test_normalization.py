"""Response normalisation is the paper's formula, with its exact gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forms import COMPILED, EXAMPLES, FORMS, Form
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import error
from torch import Tensor

from pipeline import native, normalization
from pipeline.network import Norm
from pipeline.normalization import normalize


def formula(x: Tensor, norm: Norm, columns: int) -> Tensor:
    """b = a / (k + alpha * sum of a^2 over the window)^beta, element by element."""
    reach, out = norm.size // 2, torch.empty_like(x)
    _, maps, height, width = x.shape
    each = maps // columns
    for m in range(maps):
        first = m // each * each
        near = x[:, max(first, m - reach) : min(first + each, m + reach + 1)]
        across = near.square().sum(1)
        for i in range(height):
            for j in range(width):
                rows = slice(max(0, i - reach), i + reach + 1)
                around = x[:, m, rows, max(0, j - reach) : j + reach + 1].square().sum((1, 2))
                window = around if norm.spatial else across[:, i, j]
                out[:, m, i, j] = x[:, m, i, j] / (norm.k + norm.alpha * window) ** norm.beta
    return out


norms = st.builds(
    Norm,
    st.sampled_from([1, 3, 5, 9]),
    st.sampled_from([1e-4, 0.1, 2.0]),
    st.sampled_from([0.5, 0.6, 0.75, 1.0]),
    st.sampled_from([1.0, 2.0]),
    st.booleans(),
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


@given(norms, st.integers(1, 4), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40)
def test_it_is_the_formula_windows_cut_off_at_borders_included(
    norm: Norm, each: int, columns: int, last: bool, seed: int
) -> None:
    x = noise(2, each * columns, 3, 4, seed=seed)
    laid = x.to(memory_format=torch.channels_last) if last else x
    torch.testing.assert_close(
        normalize(laid, norm, columns), formula(x, norm, columns), rtol=1e-13, atol=1e-15
    )
    single = normalize(laid.float(), norm, columns)
    assert single.dtype == torch.float32
    assert error(single, formula(x, norm, columns)) < 1e-6


@given(norms, st.integers(1, 3), st.sampled_from([1, 2]), st.integers(0, 99))
@settings(max_examples=12)
def test_its_gradient_is_that_of_finite_differences(
    norm: Norm, each: int, columns: int, seed: int
) -> None:
    x = noise(2, each * columns, 2, 3, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: normalize(t, norm, columns), x)


def test_columns_do_not_see_each_other() -> None:
    x, norm = noise(2, 8, 3, 3), Norm(alpha=0.5)
    apart = torch.cat([normalize(part, norm) for part in x.chunk(2, 1)], dim=1)
    assert torch.equal(normalize(x, norm, 2), apart)
    assert error(normalize(x, norm, 1), apart) > 0.01


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_working_in_parts_changes_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> tuple[Tensor, Tensor]:
        x = noise(3, 6, 5, 4).requires_grad_()
        y = normalize(x, Norm(alpha=0.5), 2)
        return y.detach(), torch.autograd.grad(y, x, noise(3, 6, 5, 4, seed=1))[0]

    whole = both()
    monkeypatch.setattr(normalization, "_CHUNK", chunk)
    for got, want in zip(both(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_sixteen_bits_are_rounded_only_at_the_end(dtype: torch.dtype, beta: float) -> None:
    norm, grad = Norm(alpha=0.1, beta=beta), noise(2, 32, 4, 4, seed=1).to(dtype)
    x = (noise(2, 32, 4, 4) * 3).to(dtype)
    wide = x.double().requires_grad_()
    want = formula(wide.detach(), norm, 1)
    y = normalize(wide, norm)
    (want_grad,) = torch.autograd.grad(y, wide, grad.double())
    leaf = x.clone().requires_grad_()
    got = normalize(leaf, norm)
    (got_grad,) = torch.autograd.grad(got, leaf, grad)
    assert (got.dtype, got_grad.dtype) == (dtype, dtype)
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), want, rtol=1.01 * half, atol=1e-6)
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=1.01 * half, atol=1e-6)


def results(
    x: Tensor, norm: Norm, columns: int, rectify: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """y and the gradient, computed in `dtype` from what x's own dtype can hold."""
    leaf = x.to(dtype or x.dtype).requires_grad_()
    y = normalize(leaf, norm, columns, rectify)
    grad = noise(*x.shape, seed=1).to(x.dtype).to(y)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    st.sampled_from([1, 3, 5, 9, 17, 33]),
    st.integers(1, 70) | st.just(512),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=EXAMPLES)
def test_every_form_is_the_same_mathematics(
    form: Form,
    dtype: torch.dtype,
    size: int,
    each: int,
    columns: int,
    rectify: bool,
    beta: float,
    seed: int,
) -> None:
    norm = Norm(size, alpha=0.1, beta=beta)
    x = noise(3, each * columns, 3, 2, seed=seed).to(dtype)
    with form.used():
        got = results(x.to(form.device), norm, columns, rectify)
    want = results(x, norm, columns, rectify, torch.float64)
    rounding = 1e-6 if dtype == torch.float32 else form.rounding * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=rounding, atol=1e-6)


@pytest.mark.skipif(bool(native.missing()), reason=native.missing())
def test_threads_change_no_bit_of_it() -> None:
    x, threads = noise(5, 96, 7, 7).float(), torch.get_num_threads()
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(x, Norm(), 2, True))
    torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, found[0], strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rectified_it_is_relu_and_then_normalisation(form: Form, dtype: torch.dtype) -> None:
    x = noise(2, 12, 3, 3).to(form.device, dtype)
    x[0, 0, 0, 0], x[1, 2, 0, 0] = float("nan"), 0.0
    with form.used():
        y, grad = results(x, Norm(alpha=0.1), 2, True)
        leaf = x.clone().requires_grad_()
        apart = normalize(leaf.relu(), Norm(alpha=0.1), 2)
        (want,) = torch.autograd.grad(apart, leaf, noise(*x.shape, seed=1).to(y))
    torch.testing.assert_close(y, apart.detach(), equal_nan=True)
    torch.testing.assert_close(grad[1], want[1])
    assert y[0, 0, 0, 0].isnan()
    assert grad[1, 2, 0, 0] == 0


@pytest.mark.parametrize("form", COMPILED)
def test_a_nan_reaches_its_window_and_no_further(form: Form) -> None:
    x = noise(1, 32, 1, 1).float().to(form.device)
    x[0, 20] = float("nan")
    with form.used():
        y, grad = results(x, Norm(), 2, False)
    lost = [m for m in range(32) if y[0, m].isnan()]
    assert lost == [18, 19, 20, 21, 22]
    assert [m for m in range(32) if grad[0, m].isnan()] == [16, 17, *lost, 23, 24]


def test_what_the_compiler_said_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._load.cache_clear()
    monkeypatch.setenv("CXX", "false")
    assert "false failed" in native.missing()
    assert not list(tmp_path.rglob("*.so"))
    native._load.cache_clear()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in native.missing()
    native._load.cache_clear()
    monkeypatch.undo()
