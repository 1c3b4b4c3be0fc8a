"""Slow fp64 references of every method, written from the papers' equations, not from molora's code.

`reference(state, x, base, hyper, inputs) -> y`: `state` holds the fp64 tensors of one adapted module by checkpoint
name (and those it shares), `x [B, S, in]` the module's input, `base` the frozen module (for mixlora a namespace with
gate, up, down and act), `hyper` the settings in force (`ranks` and `scales` always hold every expert's), `inputs` what
else the method reads: `task_ids [B]`, `expert_scores [B, E]`, `prompt_mask [B, S]`, and `decision`, what a shared
router read. They describe inference. Everything is differentiable but the selections.
"""

from __future__ import annotations

from collections.abc import Callable

from . import by_sequence, composed, ffn, rankwise, routed

REFERENCES: dict[str, Callable] = {
    "recommended": routed.recommended,
    "adamole": routed.adamole,
    "mole": routed.mole,
    "loramoe": routed.loramoe,
    "mixlora": ffn.mixlora,
    "mixlora-dynamic": ffn.mixlora_dynamic,
    "mola": routed.mola,
    "sira": routed.sira,
    "molora": routed.molora,
    "hydralora": routed.hydralora,
    "adamoe": routed.adamoe,
    "perft": routed.perft,
    "pmoe": routed.pmoe,
    "aoe": routed.aoe,
    "hmoe": routed.hmoe,
    "smora": rankwise.smora,
    "flylora": rankwise.flylora,
    "mor1e": rankwise.mor1e,
    "mor1e-pairs": rankwise.mor1e_pairs,
    "mora-cl": rankwise.mora_cl,
    "mos": rankwise.mos,
    "moelora": by_sequence.moelora,
    "mocle": by_sequence.mocle,
    "becotta": by_sequence.becotta,
    "polytropon": by_sequence.polytropon,
    "polytropon-mhr": by_sequence.polytropon_mhr,
    "smear": by_sequence.smear,
    "static": composed.static,
    "lora": composed.lora,
    "x-lora": composed.x_lora,
    "arrow": composed.arrow,
    "phatgoose": composed.phatgoose,
    "phatgoose-gate": composed.phatgoose_gate,
    "glider": composed.glider,
    "self-moe": composed.self_moe,
    "lora-bank": composed.lora_bank,
    "lorahub": composed.lorahub,
    "psec": composed.psec,
    "selma": composed.selma,
}
