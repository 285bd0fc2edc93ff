"""Launch choices are pure, fit what they are for, and give way to measured ones."""

import json
from pathlib import Path

import pytest
import torch

from fastbert.kernels import attention_choices, bias_gelu_choices, choices, linear_gelu_choices, row_wise_choices
from fastbert.kernels.target import KNOWN

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ARCHS = list(KNOWN)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", [row_wise_choices.layer_norm_forward, row_wise_choices.embedding_forward])
def test_whole_rows(choose, dtype, arch):
    for hidden in (1, 7, 48, 384, 768, 1024):
        assert choose(hidden, dtype, KNOWN[arch]).num_warps == 1, "up to 1024 columns a row belongs to one warp"
    for hidden, warps in ((1025, 2), (4096, 4), (8192, 8)):
        assert choose(hidden, dtype, KNOWN[arch]) == type(choose(1, dtype, KNOWN[arch]))(ROWS=1, num_warps=warps)


def test_small_rows_share_a_program():
    """A warp of 32 lanes reads 512 bytes at once: two rows of 128 halves, one of 256."""
    rows = [
        row_wise_choices.layer_norm_forward(hidden, torch.float16, KNOWN["sm_90"]).ROWS
        for hidden in (32, 128, 200, 256, 768)
    ]
    assert rows == [8, 2, 1, 1, 1]
    assert row_wise_choices.layer_norm_forward(128, torch.float32, KNOWN["sm_90"]).ROWS == 1
    assert row_wise_choices.layer_norm_forward(128, torch.float16, KNOWN["gfx942"]).ROWS == 4


@pytest.mark.parametrize(("width", "block"), [(1, 8), (8, 8), (9, 16), (768, 1024), (1024, 1024), (8192, 8192)])
def test_row_block_holds_a_row(width, block):
    assert choices.row_block(width) == block


@pytest.mark.parametrize(
    ("width", "block", "warps"),
    [(3072, 1024, 4), (1536, 512, 2), (768, 256, 1), (300, 256, 4), (100, 128, 2), (48, 64, 1), (1, 8, 1)],
)
def test_bias_gelu(width, block, warps):
    choice = bias_gelu_choices.bias_gelu_forward(width, torch.float16, KNOWN["sm_90"])
    assert choice == choices.Block(ROWS=4, BLOCK=block, num_warps=warps)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("choose", [row_wise_choices.layer_norm_backward, row_wise_choices.embedding_backward])
def test_backward_of_whole_rows(choose, dtype, arch):
    """1024 warps in all; one for a row of up to 512 columns, more where one would spill."""
    for hidden in (1, 48, 384, 512, 768, 1024, 1025, 8192):
        choice = choose(hidden, dtype, KNOWN[arch])
        assert choice.PROGRAMS * choice.num_warps == 1024
        crowded = dtype == torch.float32 or arch == "gfx1100"
        if hidden <= (512 if crowded else 1024):
            assert choice.num_warps == 1
    assert choice.num_warps == (16 if arch == "gfx1100" else 8)
    assert choose(768, torch.float32, KNOWN[arch]).num_warps == 2


@pytest.mark.parametrize(("width", "programs"), [(3072, 341), (768, 1365), (300, 512), (1, 4096), (2**23, 1)])
def test_backward_of_bias_gelu(width, programs):
    forward = bias_gelu_choices.bias_gelu_forward(width, torch.float16, KNOWN["sm_90"])
    backward = bias_gelu_choices.bias_gelu_backward(width, torch.float16, KNOWN["sm_90"])
    assert backward == choices.StridedBlock(forward.ROWS, forward.BLOCK, programs, forward.num_warps)


def test_backward_of_gated_bias_gelu_takes_fewer_rows_where_it_holds_more():
    widths = (3072, 1152, 312)
    rows = [
        bias_gelu_choices.bias_gelu_backward(width, torch.float16, KNOWN["sm_90"], gated=True).ROWS for width in widths
    ]
    assert rows == [2, 4, 2]


def test_backward_takes_two_rows_of_512_columns_where_registers_allow():
    calls = (("sm_80", torch.float16), ("gfx942", torch.bfloat16), ("sm_80", torch.float32), ("gfx1100", torch.float16))
    assert [row_wise_choices.layer_norm_backward(384, dtype, KNOWN[arch]).ROWS for arch, dtype in calls] == [2, 2, 1, 1]


def test_a_launch_takes_what_is_the_kernel_s():
    assert choices.arguments(choices.StridedRows(ROWS=2, PROGRAMS=9, num_warps=4)) == {"ROWS": 2, "num_warps": 4}
    tile = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    assert choices.arguments(choices.AttentionBiasTile(**tile)) == tile
    assert choices.arguments(choices.AttentionBiasTile(**tile, maxnreg=255)) == {**tile, "maxnreg": 255}


@pytest.mark.parametrize(("hidden", "block"), [(1, 8), (48, 64), (768, 256), (8192, 256)])
def test_backward_of_a_table(hidden, block):
    choice = row_wise_choices.embedding_backward_table(hidden, torch.float16, KNOWN["sm_90"])
    assert choice == choices.Block(ROWS=4, BLOCK=block, num_warps=1)


def test_what_the_kernels_do_not_serve():
    assert row_wise_choices.row_wise_unserved(8192, torch.float16) is None
    assert "8193" in row_wise_choices.row_wise_unserved(8193, torch.float16)
    assert "float64" in row_wise_choices.row_wise_unserved(8, torch.float64)
    assert choices.dtype_unserved(torch.bfloat16) is None
    assert "float64" in choices.dtype_unserved(torch.float64)


def test_choices_can_not_be_changed():
    with pytest.raises(AttributeError):
        bias_gelu_choices.bias_gelu_forward(768, torch.float16, KNOWN["sm_90"]).ROWS = 1


def write(path, tuned):
    path.write_text(tuned if isinstance(tuned, str) else json.dumps(tuned))
    return path


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_on_rdna_runs_without_a_gradient_where_that_spills(head_dim):
    rdna, served = KNOWN["gfx1100"], head_dim == 64
    assert attention_choices.attention_unserved(head_dim, torch.float16, rdna, gradient=False) is None
    said = attention_choices.attention_unserved(head_dim, torch.float16, rdna, gradient=True)
    assert said is None if served else "the gradient of head_dim" in said
    assert attention_choices.attention_unserved(head_dim, torch.float16, KNOWN["sm_90"], gradient=True) is None
    if served:
        assert attention_choices.attention_backward_query(64, torch.float16, extras=False, target=rdna).num_warps == 4


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "interpreter"])
def test_the_gradient_of_the_widest_heads_is_not_served_in_float32(arch):
    target = KNOWN[arch]
    assert attention_choices.attention_unserved(256, torch.float32, target, gradient=False) is None
    said = attention_choices.attention_unserved(256, torch.float32, target, gradient=True)
    assert said == f"the gradient of head_dim 256 in torch.float32 does not fit the registers of {arch}"
    assert attention_choices.attention_unserved(128, torch.float32, target, gradient=True) is None


def test_extras_take_smaller_tiles_in_the_backward_where_the_plain_ones_would_spill():
    def tiles(arch, head_dim, extras):
        here = KNOWN[arch]
        key = attention_choices.attention_backward_key(
            head_dim, torch.float16, 512, dbias=False, extras=extras, target=here
        )
        query = attention_choices.attention_backward_query(head_dim, torch.float16, extras=extras, target=here)
        return key.BLOCK_N, query.BLOCK_M

    assert tiles("sm_80", 64, False) == (128, 128)
    assert tiles("sm_80", 64, True) == (64, 64)
    assert tiles("sm_80", 48, False) == tiles("sm_80", 48, True)  # padded to 64


def test_the_forward_s_regimes():
    """Every extra takes smaller tiles, a bias those of its own where it needs them, short sequences one whole block."""

    def forward(arch, max_seqlen, head_dim=64, **extras):
        options = {"extras": bool(extras), **extras, "target": KNOWN[arch]}
        return attention_choices.attention_forward(head_dim, torch.float16, max_seqlen, rows=1001, batch=4, **options)

    table = attention_choices.ATTENTION_FORWARD["ampere", "half", 64]
    assert forward("sm_80", 300) == forward("sm_80", 300, head_dim=48) == table["default"]
    assert forward("sm_80", 64) == table["short"]
    assert forward("sm_80", 64, bias=False) == forward("sm_80", 300, bias=False) == table["extras"]
    assert forward("sm_80", 300, bias=True) == table["bias"] != table["extras"]
    assert forward("sm_90", 300, bias=True) == forward("sm_90", 300, bias=False)
    for (family, kind, _), regimes in attention_choices.ATTENTION_FORWARD.items():
        if "short" in regimes:
            assert regimes["short"].BLOCK_N >= 64 and not regimes["short"].SPLIT_TAIL, (family, kind)


def test_a_measured_choice_comes_first(tmp_path, monkeypatch):
    measured = {
        "sm_90": {
            "layer_norm_forward": {"hidden=768,dtype=float16": {"ROWS": 2, "num_warps": 2}},
            "embedding_forward": {"hidden=768,dtype=bfloat16": {"ROWS": 4, "num_warps": 1}},
            "bias_gelu_forward": {"width=3072,dtype=float32": {"ROWS": 1, "BLOCK": 512, "num_warps": 8}},
            "linear_gelu": {"rows=512,width=3072,depth=768,dtype=float16,regime=erf": {"form": "epilogue"}},
            "attention_forward": {
                "head_dim=64,dtype=float16,regime=short": {
                    "BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 2, "num_stages": 1, "SPLIT_TAIL": False, "maxnreg": 0
                }
            },
        }
    }  # fmt: skip
    monkeypatch.setattr(choices, "TUNED", choices.read_tuned(write(tmp_path / "tuned.json", measured)))
    h100, a100 = KNOWN["sm_90"], KNOWN["sm_80"]
    half, single = torch.float16, torch.float32
    assert row_wise_choices.layer_norm_forward(768, half, h100) == choices.Rows(ROWS=2, num_warps=2)
    assert row_wise_choices.layer_norm_forward(768, half, a100) == choices.Rows(ROWS=1, num_warps=1)
    assert row_wise_choices.layer_norm_forward(768, single, h100) == choices.Rows(ROWS=1, num_warps=1)
    assert row_wise_choices.layer_norm_forward(384, half, h100) == choices.Rows(ROWS=1, num_warps=1)
    assert row_wise_choices.embedding_forward(768, torch.bfloat16, h100) == choices.Rows(ROWS=4, num_warps=1)
    assert bias_gelu_choices.bias_gelu_forward(3072, single, h100) == choices.Block(ROWS=1, BLOCK=512, num_warps=8)
    product = linear_gelu_choices.linear_gelu(100, 3072, 768, half, approximate="none", gradient=False, target=h100)
    assert product == choices.LinearGeluForm("epilogue")
    attention = attention_choices.attention_forward(64, half, 32, rows=64, batch=2, extras=False, target=h100)
    assert attention == choices.AttentionTile(32, 16, 2, 1, SPLIT_TAIL=False)


@pytest.mark.parametrize(
    ("tuned", "says"),
    [
        ("{", "not JSON"),
        ([], "expected an object"),
        ({"sm_90": 3}, "sm_90: got 3"),
        ({"sm_90": {"layer_nrom": {}}}, "no op 'layer_nrom'"),
        ({"sm_90": {"layer_norm_forward": {"hidden=768": {"ROWS": 1}}}}, "expected whole numbers for"),
        ({"sm_90": {"linear_gelu": {"rows=512": {"form": "quick"}}}}, "expected one of .*'epilogue'"),
        ({"sm_90": {"linear_gelu": {"rows=512": {"form": 1}}}}, "expected one of .*'epilogue'"),
        (
            {"sm_90": {"layer_norm_forward": {"hidden=768": {"ROWS": 1, "num_warps": "4"}}}},
            "expected whole numbers for",
        ),
        ({"sm_90": {"layer_norm_forward": {"hidden=768": {"ROWS": 1, "num_warps": 4, "BLOCK": 8}}}}, "BLOCK"),
    ],
)
def test_a_malformed_file_says_where(tuned, says, tmp_path):
    path = write(tmp_path / "tuned.json", tuned)
    with pytest.raises(ValueError, match=says) as raised:
        choices.read_tuned(path)
    assert str(path) in str(raised.value)


def test_the_shipped_file_can_be_read():
    assert choices.read_tuned(Path(choices.__file__).with_name("tuned.json")) == choices.TUNED


def test_the_version_of_triton_is_known_without_loading_it(monkeypatch):
    for version, wanted in (("3.7.1", (3, 7)), ("3.10.0+git1", (3, 10))):
        monkeypatch.setattr(attention_choices.metadata, "version", lambda name, version=version: version)
        assert attention_choices.triton_version() == wanted

    def missing(name):
        raise attention_choices.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(attention_choices.metadata, "version", missing)
    assert attention_choices.triton_version() == (0, 0)
