"""Which formats fit where and how fast: sizes against published files, places add up, speeds against published ones."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3.config import PRESETS
from dsv3.errors import UserError
from dsv3.planner.fit import FORMATS, SOURCES, Assumptions, Machine, Option, best, fit
from dsv3.planner.hardware import find_profile

V3 = PRESETS["v3-671b"]
CARD, H200 = find_profile("rtx4090"), find_profile("h200")
DESKTOP = Machine(CARD, 2, 256e9, 89.6e9, 1e12)
# Two Xeon 6454S, eight channels of DDR5-4800 each, 2 TFLOP/s bf16 per core (KTransformers' AMX document).
XEONS = Machine(CARD, 1, 1e12, 614e9, 128e12)


def option(machine: Machine, name: str, config=V3, **more) -> Option:
    return next(o for o in fit(config, machine, **more) if o.format == name)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("bf16", 1342.1e9),  # 671,026,419,200 parameters
        ("fp8", 673.2e9),  # `dsv3 inspect`
        ("q8_0", 713.3e9),  # bartowski/deepseek-ai_DeepSeek-V3-0324-GGUF
        ("q4_k_m", 404.4e9),
        ("q3_k_xl", 275.576 * 2**30),  # unsloth/DeepSeek-R1-0528-GGUF, as llama.cpp prints them
        ("q2_k_xl", 233.852 * 2**30),
        ("iq2_xxs", 196.2e9),  # unsloth/DeepSeek-R1-GGUF, UD-IQ2_XXS and UD-IQ1_S
        ("iq1_s", 140.2e9),
    ],
)
def test_sizes_are_those_of_published_files(name: str, published: float) -> None:
    assert option(DESKTOP, name).size == pytest.approx(published, rel=5e-3)


def test_parts_add_up_and_stay_within_the_memories() -> None:
    for machine in (DESKTOP, XEONS, Machine(None, 0, 64e9, 50e9, 1e12), Machine(H200, 8, 2e12, 400e9, 1e13)):
        for o in fit(V3, machine):
            if not o.context:
                continue
            assert o.on_gpu + o.in_ram + o.on_disk == pytest.approx(o.size)
            room = 0 if machine.gpu is None else machine.gpus * machine.gpu.memory * 0.9
            assert o.on_gpu <= room and o.in_ram <= machine.ram * 0.95 + 1
            assert min(o.on_gpu, o.in_ram, o.on_disk) >= -1, o


def test_two_4090s_and_256_gb() -> None:
    """The question of the issue: what stays in memory is 3 bits wide, and llama.cpp runs it."""
    options = fit(V3, DESKTOP)
    assert [o.size for o in options] == sorted((o.size for o in options), reverse=True)
    chosen = best(options)
    assert chosen is not None and chosen.format == "q2_k_xl" and chosen.programs == ("llama.cpp",)
    assert 4 < chosen.tokens_per_second < 8 and chosen.context == 32768
    larger = option(DESKTOP, "q4_k_m")
    assert larger.on_disk > 100e9 and larger.tokens_per_second < 1 < chosen.tokens_per_second
    assert option(DESKTOP, "int8").programs == (), "KTransformers maps nothing from disk"


def test_less_is_slower_and_more_is_faster() -> None:
    base = option(DESKTOP, "q2_k_xl").tokens_per_second
    wider = dataclasses.replace(DESKTOP, ram_bandwidth=2 * DESKTOP.ram_bandwidth)
    assert option(wider, "q2_k_xl").tokens_per_second > 1.5 * base
    assert option(dataclasses.replace(DESKTOP, gpus=1), "q2_k_xl").tokens_per_second < base
    assert option(dataclasses.replace(DESKTOP, ram=128e9), "q2_k_xl").on_disk > 0


def test_one_tokens_seconds_are_the_sum_of_the_memories() -> None:
    o = option(XEONS, "q4_k_m")
    chosen = 58 * 8 * 3 * 7168 * 2048 * 4.82 / 8
    in_ram = chosen * (1 - (o.on_gpu - 10.2e9) / 394e9)  # experts beside attention are a few
    at_least = in_ram / (614e9 * 0.57) + 61 * 5e-4
    assert 1 / o.tokens_per_second == pytest.approx(at_least + 10.2e9 / (1.008e12 * 0.7), rel=0.05)


def test_gpus_that_hold_all_of_it_split_every_layer_or_not() -> None:
    machine = Machine(H200, 8, 2e12, 400e9, 1e13)
    together, apart = option(machine, "fp8"), option(machine, "q8_0")
    assert together.programs == ("vLLM, SGLang",) and together.on_gpu == together.size
    assert together.tokens_per_second > 1.5 * apart.tokens_per_second, "llama.cpp goes from GPU to GPU"


def test_dsv3_says_what_it_runs() -> None:
    small = PRESETS["v3-16b"]
    assert "dsv3" in option(Machine(None, 0, 64e9, 90e9, 1e12), "bf16", small).programs
    assert "dsv3" in option(Machine(H200, 1, 64e9, 90e9, 1e12), "bf16", small).programs
    assert "dsv3" not in option(Machine(CARD, 2, 64e9, 90e9, 1e12), "bf16", small).programs
    assert not any("dsv3" in name for o in fit(small, DESKTOP) if o.format != "bf16" for name in o.programs)
    packed = {
        o.format
        for o in fit(small, Machine(None, 0, 64e9, 90e9, 1e12))
        if any("dsv3 " in n for n in o.programs)
    }
    assert packed == {"q8_0", "fp8", "mixed"}


def test_context_shrinks_before_the_model_is_refused() -> None:
    assert 0 < option(Machine(None, 0, 12.5e9, 50e9, 1e12), "iq1_s").context < 32768
    nothing = option(Machine(None, 0, 8e9, 50e9, 1e12), "iq1_s")
    assert nothing.context == 0 and not nothing.programs and not nothing.runs
    assert option(DESKTOP, "iq1_s", context=4096).context == 4096
    assert option(DESKTOP, "bf16", PRESETS["nano"]).context == PRESETS["nano"].max_position_embeddings


def test_bad_machines_are_refused() -> None:
    with pytest.raises(UserError, match="gpus is 2"):
        Machine(None, 2, 1e9, 1e9, 1e9)
    with pytest.raises(UserError, match="above 0"):
        Machine(None, 0, 0, 1e9, 1e9)


def test_every_assumption_has_a_source() -> None:
    assert {field.name for field in dataclasses.fields(Assumptions)} == SOURCES.keys()
    assert len({kind.name for kind in FORMATS}) == len(FORMATS)


# ---------------------------------------- against published speeds


def test_against_ktransformers() -> None:
    """R1 q4_k_m on a 4090 and two Xeon 6454S: 12.2 tokens/s with 8 experts, 13.69 with 6; one socket 8.73. These gave
    `ram_share` and `overhead`. Prompts of 2K, int8: 255 tokens/s, 286 with 6 experts; ours is a limit."""
    six = V3.replace(num_experts_per_tok=6)
    assert option(XEONS, "q4_k_m").tokens_per_second == pytest.approx(12.2, rel=0.1)
    assert option(XEONS, "q4_k_m", six).tokens_per_second == pytest.approx(13.69, rel=0.1)
    one = dataclasses.replace(XEONS, ram=512e9, ram_bandwidth=307e9, cpu_flops=64e12)
    assert option(one, "q4_k_m").tokens_per_second == pytest.approx(8.73, rel=0.1)
    assert 1.5 < option(XEONS, "int8").prompt_tokens_per_second / 255 < 1.8
    assert 1.5 < option(XEONS, "int8", six).prompt_tokens_per_second / 286 < 1.8


def test_against_sglang_on_cpus() -> None:
    """R1 int8 on two Xeon 6980P: 68 ms per token."""
    profile = find_profile("server-cpu")
    machine = Machine(None, 0, profile.memory, profile.bandwidth, profile.bf16_flops)
    o = option(machine, "int8")
    assert 1e3 / o.tokens_per_second == pytest.approx(68, rel=0.1) and "SGLang on CPU" in o.programs


def test_against_llama_cpp_on_a_server() -> None:
    """Tencent Xuanwu Lab (16 March 2025): q8_0 on one EPYC 9135, 12 channels of DDR5-5600: 7.17 tokens/s."""
    machine = Machine(None, 0, 768e9, 12 * 8 * 5.6e9, 2e12)
    assert option(machine, "q8_0").tokens_per_second == pytest.approx(7.17, rel=0.15)


def test_against_a_desktop() -> None:
    """hexkern.com: R1 in 130 GB of iq1_s on an i7-14700 with two channels of DDR5-4800 and a 4090: about 7 tokens/s."""
    machine = Machine(CARD, 1, 192e9, 2 * 8 * 4.8e9, 1e12)
    assert option(machine, "iq1_s").tokens_per_second == pytest.approx(7, rel=0.2)
