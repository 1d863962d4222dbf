"""Formats of blocks: their bit patterns and scales against published tables and torch's own small floats."""

import itertools

import pytest
import torch
from torch import Tensor

from duquant.elements import E2M1, Int4
from duquant.formats import BLOCK_FORMATS, Codes, MxFp4, NvFp4
from duquant.packing import decode_weight, pack, packed_width, unpack
from duquant.quantizer import FoundClip, Quantizer, make_quantizer
from duquant.scheme import TensorScheme, make_scheme, number_format

# OCP Microscaling Formats 1.0, table of E2M1: bits S EE M
E2M1_TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
every_format = pytest.mark.parametrize("name", BLOCK_FORMATS)


def blocks(name: str, rows: int = 6, count: int = 3, seed: int = 0) -> Tensor:
    """Rows of blocks of very different magnitude, float32."""
    generator, size = torch.Generator().manual_seed(seed), BLOCK_FORMATS[name].block
    x = torch.randn(rows, count, size, generator=generator) * torch.logspace(-3, 2, rows * count).view(rows, count, 1)
    return x.flatten(1)


def quantizer_of(name: str, x: Tensor, **further) -> Quantizer:
    form = BLOCK_FORMATS[name]()
    base = form.base_of(x.abs().amax()[None].float()) if form.has_base else None
    return Quantizer(form, group_size=form.block, base=base, **further)


def test_patterns_of_e2m1_are_those_of_the_standard():
    patterns = torch.arange(16, dtype=torch.uint8)
    numbers = E2M1.number(patterns, torch.float32)
    assert [str(each) for each in numbers.tolist()] == [str(each) for each in E2M1_TABLE]
    assert torch.equal(E2M1.pattern(numbers), patterns)


def test_patterns_of_integers_are_two_s_complement():
    numbers = torch.arange(-8.0, 8)
    assert Int4.pattern(numbers).tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7]
    assert torch.equal(Int4.number(Int4.pattern(numbers), torch.float32), numbers)


@pytest.mark.parametrize("elements", [E2M1, Int4])
def test_rounding_goes_to_the_nearest_number_and_on_ties_to_the_even_pattern(elements):
    numbers = sorted(
        {each + 0.0 for each in elements.number(torch.arange(16, dtype=torch.uint8), torch.float64).tolist()}
    )
    for low, high in itertools.pairwise(numbers):
        near = torch.tensor([low + 0.49 * (high - low), low + 0.51 * (high - low)], dtype=torch.float64)
        assert elements.nearest(near).tolist() == [low, high]
        tie = elements.nearest(torch.tensor([(low + high) / 2], dtype=torch.float64))
        assert elements.pattern(tie).item() % 2 == 0
    ends = torch.tensor([-100.0, 100.0], dtype=torch.float64)
    assert elements.nearest(ends).tolist() == [numbers[0], numbers[-1]]


@pytest.mark.parametrize("name", ["mxfp4", "mxint4"])
def test_power_scales_are_those_of_the_standard_and_torch_reads_their_bits(name):
    form, peaks = BLOCK_FORMATS[name](), torch.tensor([0.75, 1.0, 3.999, 4.0, 6.0, 7.999, 8.0, 1e-30, 1e30])[:, None]
    scale, zero = form.parameters(-peaks, peaks / 2)
    expected = [2.0 ** (int(torch.tensor(peak).double().log2().floor()) - 2) for peak in peaks[:, 0].tolist()]
    assert scale[:, 0].tolist() == expected
    assert not zero.any()
    bits = form.stored(scale, None)
    assert torch.equal(bits.view(torch.float8_e8m0fnu).float(), scale)
    every = torch.arange(1, 255, dtype=torch.uint8)
    assert torch.equal(form.restored(every, None), every.view(torch.float8_e8m0fnu).float())
    assert torch.equal(form.stored(form.restored(every, None), None), every)


def test_a_clip_of_four_thirds_is_the_rule_that_cuts_off_nothing():
    x = blocks("mxfp4", rows=40)
    kept = Quantizer(MxFp4(), FoundClip(torch.tensor([4 / 3, 4 / 3])), group_size=32).encode(x)
    peaks = x.unflatten(1, (-1, 32)).abs().amax(dim=-1, keepdim=True)
    assert (peaks <= 6 * kept.scale).all()
    assert (peaks > 3 * kept.scale).all()  # and no power of two less would do
    cut = Quantizer(MxFp4(), group_size=32).encode(x)
    assert (peaks > 6 * cut.scale).any()


def test_scales_of_nvfp4_are_numbers_of_e4m3_times_the_base():
    x = blocks("nvfp4", rows=40)
    codes = quantizer_of("nvfp4", x).encode(x)
    peaks = x.unflatten(1, (-1, 16)).abs().amax(dim=-1, keepdim=True)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers > 0]
    nearest = (peaks / 6 / codes.base - numbers).abs().amin(dim=-1, keepdim=True)
    torch.testing.assert_close((peaks / 6 / codes.base - codes.scale / codes.base).abs(), nearest, rtol=0, atol=1e-4)
    least = x.abs().max().item() / (448 * 6)
    assert least <= codes.base.item() < 2 * least
    assert torch.frexp(codes.base).mantissa.item() == 0.5  # a power of two


def test_numbers_of_nvfp4_are_exact_in_bfloat16():
    x = blocks("nvfp4", rows=40)
    found = quantizer_of("nvfp4", x)(x)
    assert torch.equal(found.bfloat16().float(), found)


def test_vectors_without_a_base_have_their_own_so_that_none_depends_on_its_neighbours():
    x, quantizer = blocks("nvfp4"), Quantizer(NvFp4(), group_size=16)
    alone = torch.cat([quantizer(row[None]) for row in x])
    assert torch.equal(quantizer(x), alone)


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_decoded_packed_codes_are_fake_quantization_to_the_bit(name, dtype):
    x = blocks(name).to(dtype)
    quantizer = quantizer_of(name, x)
    form, codes = quantizer.format, quantizer.encode(x)
    assert torch.equal(quantizer.decode(codes).to(dtype), quantizer(x))
    if dtype is not torch.float64:  # scales at rest have no more than float32
        packed = pack(codes, form)
        assert packed.values.shape == (len(x), packed_width(x.shape[1], form)) == (len(x), x.shape[1] // 2)
        assert packed.scale.dtype == torch.uint8
        assert packed.scale.numel() * form.block == x.numel()
        assert packed.zero is None
        assert torch.equal(decode_weight(packed, form, dtype), quantizer(x))
        assert torch.equal(unpack(packed, form).scale, codes.scale)
        assert torch.equal(decode_weight(packed.rows(slice(2, 4)), form, dtype), quantizer(x)[2:4])


@every_format
@pytest.mark.parametrize("has_base", [True, False])
def test_a_fitted_block_has_the_scale_among_the_choices_that_rounds_it_best(name, has_base):
    x, form = blocks(name, rows=40), BLOCK_FORMATS[name]()
    base = form.base_of(2 * x.abs().amax()[None]) if form.has_base and has_base else None
    if form.has_base and not has_base:  # that of its largest block, under the largest ratio
        base = (x.abs().amax(dim=1)[:, None, None] * 1.5 / (448 * 6)).clamp(min=2.0**-100)
    clip = make_quantizer(make_scheme(name, 4, False, None, "block")).clip
    codes = Quantizer(form, clip, form.block, base if has_base else None).encode(x)
    vectors = x.unflatten(1, (-1, form.block))
    low, high = vectors.amin(dim=-1, keepdim=True), vectors.amax(dim=-1, keepdim=True)
    each = [form.parameters(ratio * low, ratio * high, base) for ratio in form.choices]
    errors = torch.stack([(form.fake(vectors, way) - vectors).square().sum(dim=-1) for way in each])
    found = (form.decode(codes) - vectors).square().sum(dim=-1)
    assert torch.equal(found, errors.amin(dim=0))
    assert (errors.argmin(dim=0) > 0).any()
    assert (errors.argmin(dim=0) == 0).any()


@every_format
def test_a_fitted_vector_does_not_depend_on_its_neighbours_and_its_gradient_passes(name):
    x, quantizer = blocks(name), make_quantizer(make_scheme(name, 4, False, None, "block"))
    assert torch.equal(quantizer(x), torch.cat([quantizer(row[None]) for row in x]))
    differentiated = x.clone().requires_grad_()
    quantizer(differentiated).sum().backward()
    assert differentiated.grad.isfinite().all()
    assert (differentiated.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize(("name", "gain"), [("nvfp4", 0.22), ("mxfp4", 0.05), ("mxint4", 0.25)])
def test_what_fitting_takes_off_the_error_of_normally_distributed_numbers(name, gain):
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    plain, fitted = (make_quantizer(make_scheme(name, 4, False, None, clip)) for clip in (None, "block"))
    assert 1 - ((fitted(x) - x).norm() / (plain(x) - x).norm()).square().item() == pytest.approx(gain, abs=0.01)


def test_integers_have_no_blocks_to_fit():
    with pytest.raises(ValueError, match="int has no blocks"):
        TensorScheme(clip="block")


@every_format
def test_the_error_is_at_most_half_the_gap_between_elements_where_nothing_is_cut_off(name):
    x = blocks(name)
    quantizer = quantizer_of(name, x, clip=FoundClip(torch.tensor([4 / 3, 4 / 3])))
    scale = quantizer.encode(x).scale
    gap = 2.0 if quantizer.format.elements is E2M1 else 1.0  # 4 … 6
    assert ((quantizer(x) - x).unflatten(1, (*scale.shape[1:2], -1)).abs() <= gap / 2 * scale * 1.0001).all()


@every_format
def test_zeros_and_the_smallest_numbers_stay_finite(name):
    x = torch.zeros(3, 2 * BLOCK_FORMATS[name].block)
    x[1, 0], x[2, :] = 1e-44, 1e-38
    found = Quantizer(BLOCK_FORMATS[name](), group_size=BLOCK_FORMATS[name].block)(x)
    assert found.isfinite().all()
    assert not found[0].any()


@every_format
def test_gradients_pass_rounding_and_stop_where_magnitudes_are_cut_off(name):
    form = BLOCK_FORMATS[name]()
    x = torch.linspace(-1, 1, form.block)[None, None].clone().requires_grad_()
    low, high = x.detach().amin(dim=-1, keepdim=True), x.detach().amax(dim=-1, keepdim=True)
    form.fake(x, form.parameters(low / 2, high / 2)).sum().backward()
    assert (x.grad[x.detach().abs() < 0.4] == 1).all()
    assert x.grad[0, 0, -1] == 0


@every_format
def test_a_learned_clip_is_told_which_way_the_error_falls(name):
    form, x = BLOCK_FORMATS[name](), blocks(name, rows=1, count=1)[None]
    ratio = torch.tensor([0.6], requires_grad=True)
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    (form.fake(x, form.parameters(ratio * low, ratio * high)) - x).square().sum().backward()
    assert ratio.grad.isfinite().all()
    assert ratio.grad.item() < 0  # far too much is cut off: the clip has to grow


@every_format
def test_a_scheme_says_what_its_format_fixes(name):
    form = BLOCK_FORMATS[name]
    scheme = make_scheme(name, 4, False, None, None)
    assert (scheme.group_size, scheme.symmetric, scheme.bits) == (form.block, True, 4)
    assert number_format(scheme) == form()
    with pytest.raises(ValueError, match=f"blocks of {form.block}"):
        TensorScheme(name, 4, False, 7)
    with pytest.raises(ValueError, match="not known; known are int, mxfp4, nvfp4, mxint4"):
        TensorScheme("fp5")
    assert isinstance(make_quantizer(scheme).format, form)


def test_codes_of_nvfp4_are_not_packed_without_their_base():
    codes = Quantizer(NvFp4(), group_size=16).encode(blocks("nvfp4"))
    with pytest.raises(ValueError, match="base"):
        pack(Codes(codes.values, codes.scale, codes.zero), NvFp4())
