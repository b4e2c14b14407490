"""The kernels for norms and rotary positions give what float64 gives, rounded."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
from mp_rerank._engine.amx.library import find_library, why_not  # noqa: E402
from mp_rerank._engine.amx.rows import Norm, rotate  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_library() is None, reason=why_not() or "there is a library")]

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seeded(threads: None) -> None:
    torch.manual_seed(0)


def assert_rounded(found: torch.Tensor, expected: torch.Tensor) -> None:
    """``found`` is ``expected``, of float64, but for rounding to its dtype and in float32 before it."""
    limit = 2**-8 if found.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 15, 16, 40, 128, 256, 1000])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_layer_norm(dtype: torch.dtype, width: int, rows: int) -> None:
    states = (torch.randn(1, rows, width) + 3).to(dtype)  # numbers around 3: their mean is taken away
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    for with_bias in (bias, None):
        expected = torch.nn.functional.layer_norm(
            states.double(), (width,), weight.double(), None if with_bias is None else bias.double(), 1e-5
        )
        found = Norm(weight, with_bias, 1e-5, centred=True)(states)
        assert found.dtype is dtype
        limit = 2**-8 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.double(), expected, rtol=limit, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 300, 256), (1, 5, 33), (1, 70, 4, 128)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Also of each head."""
    states, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    expected = torch.nn.functional.rms_norm(states.double(), shape[-1:], weight.double(), 1e-6)
    assert_rounded(Norm(weight, None, 1e-6, centred=False)(states), expected)
    apart = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]]
    expected = torch.nn.functional.rms_norm(apart.double(), shape[-1:], weight.double(), 1e-6)
    assert_rounded(Norm(weight, None, 1e-6, centred=False)(apart), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 384])
def test_norm_of_a_sum(dtype: torch.dtype, width: int) -> None:
    states, residual = (torch.randn(1, 300, width).to(dtype) for _ in range(2))
    weight, expected = torch.randn(width).to(dtype), states.double() + residual.double()
    found = Norm(weight, None, 1e-5, centred=True)(states, residual)
    assert_rounded(states, expected)
    expected = torch.nn.functional.layer_norm(expected, (width,), weight.double(), None, 1e-5)
    limit = 2**-8 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_goes_where_it_is_told_to(dtype: torch.dtype) -> None:
    norm = Norm(torch.randn(40), torch.randn(40), 1e-5, centred=True)
    states, memory = torch.randn(70, 40).to(dtype), torch.full((70, 40), torch.nan, dtype=dtype)
    expected = norm(states)
    assert norm(states, into=memory) is memory
    assert torch.equal(memory, expected)
    for wrong in (memory[1:], memory.double(), torch.empty(40, 70, dtype=dtype).T):
        with pytest.raises(ValueError, match="into"):
            norm(states, into=wrong)
    assert norm(states, into=states) is states
    assert torch.equal(states, expected)


def test_states_that_a_norm_is_not_for() -> None:
    norm = Norm(torch.ones(32), None, 1e-5, centred=True)
    with pytest.raises(ValueError, match="32 numbers"):
        norm(torch.randn(4, 33))
    with pytest.raises(ValueError, match="float64"):
        norm(torch.randn(4, 32).double())
    with pytest.raises(ValueError, match="sum"):
        norm(torch.randn(4, 32), torch.randn(5, 32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 8, 34, 64, 80, 128])
@pytest.mark.parametrize("tokens", [1, 300])
def test_rotary_positions(dtype: torch.dtype, width: int, tokens: int) -> None:
    """Of queries and keys with fewer heads, as they lie in a product of all three; the values stay as they are."""
    heads, key_heads = 6, 2
    product = torch.randn(1, tokens, heads + 2 * key_heads, width).to(dtype)
    before = product.clone().double()
    query, key, _ = (part.transpose(1, 2) for part in product.split([heads, key_heads, key_heads], dim=2))
    cos, sin = (torch.randn(1, tokens, width).to(dtype) for _ in range(2))
    assert rotate(query, key, cos, sin)
    first, second = before.chunk(2, dim=-1)
    expected = before * cos.double().unsqueeze(2) + torch.cat([-second, first], -1) * sin.double().unsqueeze(2)
    expected[:, :, heads + key_heads :] = before[:, :, heads + key_heads :]
    assert_rounded(product, expected)


def test_what_is_not_rotated_here() -> None:
    query, key, cos = torch.randn(1, 4, 9, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 9, 32)
    before = query.clone(), key.clone()
    assert not rotate(query, key, cos[..., :16], cos[..., :16])  # a part of each head
    assert not rotate(query, key, cos.double(), cos.double())
    assert not rotate(query, key[:, :1].expand(-1, 2, -1, -1), cos, cos)  # one head's memory for two
    assert not rotate(query.transpose(2, 3), key.transpose(2, 3), cos, cos)
    assert not rotate(query.expand(2, -1, -1, -1), key, cos, cos)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])


def test_threads_stay_whatever_is_computed() -> None:
    """A call with a smaller team would end the others' threads, and the next one would start them again."""
    torch.set_num_threads(4)
    norm = Norm(torch.ones(256), None, 1e-5, centred=True)

    def threads_after(rows: int) -> set[str]:
        norm(torch.randn(rows, 256))
        return set(os.listdir("/proc/self/task"))

    present = threads_after(4000)
    for rows in (1, 100, 300, 512, 700, 4000):
        assert threads_after(rows) == present
