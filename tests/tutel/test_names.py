"""Tutel's public names, as data, with the parameters of each in order: a script finds all of them."""

import importlib
import inspect
import subprocess
import sys

import pytest

FACE = "tutelx.integrations.tutel"

NAMES = {
    "net": {
        "get_world_size": "group",
        "get_world_rank": "group",
        "create_groups_from_world": "group_count include_init parent_group",
        "create_standalone_group": "",
        "barrier": "group",
        "simple_broadcast": "input src group",
        "simple_all_reduce": "input group op inplace",
        "simple_all_to_all": "input group background",
        "simple_split": "input group",
        "simple_reduce_scatter": "input group op",
        "simple_all_gather": "input group",
        "all_to_all": "input input_dim output_dim group background use_2dh",
        "all_to_all_single": "input group",
        "all_gather": "input dim fused group",
        "zero_gather": "input full_shape group",
        "zero_scatter": "input scatter_fn group",
        "spatial_split": "input dim group",
        "reduce_scatter": "input dim group",
        "allreduce_forward": "input op group",
        "allreduce_backward": "input op group",
        "batch_all_to_all_v": "datas partition_sizes group",
        "batch_all_gather_v": "datas group",
        "TutelDistributedOptimizer": "params group average_shared",
        "TutelDistributedOptimizer.chunk_param": "self",
        "TutelDistributedOptimizer.chunk_grad": "self",
        "TutelDistributedOptimizer.restore": "self",
        "TutelDistributedOptimizer.warp_local": "self local_optim args kwargs",
        "TutelDistributedOptimizer.zero_grad": "self",
        "TutelDistributedOptimizer.step": "self",
    },
    "system": {
        "init_affinity_at_program_beginning": "",
        "init_data_model_parallel": "group_count backend",
        "cache": "",
        "LocalCache.reset": "",
        "LocalCache.set": "key val",
        "LocalCache.get": "key",
        "get_local_session": "",
        "record_time": "is_cuda",
        "save": "t path",
        "load": "path device",
        "perform": "fn num_runs",
        "from_url": "link path",
        "apply_rank_size_from_pattern": "filename rank size create_dir",
    },
    "moe": {
        "fast_cumsum_sub_one": None,
        "fast_dispatcher": None,
        "extract_critical": None,
        "fast_encode": None,
        "fast_decode": None,
        "get_reversed_sample_ids": None,
        "get_topk_selection": None,
        "top_k_routing": None,
        "moe_layer": None,
        "moe_layer.global_expert_count": "num_local_experts group",
        "moe_layer.get_parameter_iterator": "self param_type",
        "moe_layer.forward": "self input gate_index capacity_factor top_k a2a_ffn_overlap_degree reserve_dims"
        " inequivalent_tokens adaptive_r megablocks_size",
    },
    "checkpoint.gather": {"main": "argv"},
    "checkpoint.scatter": {"main": "argv"},
    "launcher.run": {"main": "argv"},
    "launcher.execl": {"main": "argv"},
    "jit": {"create_cuda_kernel": "source keyword_dict"},
}

# What its serving operators are called: none of them can be had, and each says so.
SERVING = [
    "pad_at_dim",
    "to_float8_rowwise",
    "to_float8_blockwise",
    "from_float8_blockwise",
    "to_float4_groupwise",
    "from_float4_groupwise",
    "from_int4_groupwise",
    "from_mxfp4",
    "marlin_pack",
    "marlin_nvfp4_pack",
    "sparse_bmm_infer",
]

SESSION = [
    "global_size",
    "global_rank",
    "local_rank",
    "local_size",
    "group_count",
    "data_rank",
    "model_size",
    "model_rank",
    "local_device",
    "data_group",
    "model_group",
    "global_group",
    "is_distributed",
    "dist_print",
    "is_cuda",
]


@pytest.mark.parametrize("module", NAMES)
def test_every_name(module):
    found = importlib.import_module(f"{FACE}.{module}")
    for path, parameters in NAMES[module].items():
        value = found
        for name in path.split("."):
            value = getattr(value, name)
        assert callable(value), path
        if parameters is not None:
            assert list(inspect.signature(value).parameters) == parameters.split(), path


def test_the_session_has_every_field(monkeypatch):
    from tutelx.integrations.tutel import net, system

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    env = net.create_groups_from_world(1, "gloo")
    assert [name for name in SESSION if not hasattr(env, name)] == []
    assert system.TUTEL_CUDA_SANDBOX == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = system.nothing


def test_what_cannot_be_had_says_what_to_use():
    from tutelx.integrations.tutel import jit, ops

    with pytest.raises(NotImplementedError, match="load_inline or Triton"):
        jit.create_cuda_kernel("extern ..", {})
    for name in SERVING:
        function = getattr(ops, name)
        with pytest.raises(NotImplementedError, match=rf"^{name} belongs to .* tutelx\.ops has"):
            function(1, dim=2)
    with pytest.raises(AttributeError):
        _ = ops.__wrapped__


def test_the_package_imports_nothing_before_it_is_used():
    code = f"""
import sys, {FACE} as tutel
heavy = [name for name in sys.modules if name.startswith("torch") or name.startswith("{FACE}.")]
assert not heavy, heavy
assert tutel.system_init is tutel.system and tutel.net.__name__ == "{FACE}.net"
assert set(dir(tutel)) >= {{"checkpoint", "jit", "launcher", "moe", "net", "ops", "system"}}
try: tutel.nothing
except AttributeError as error: print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "has no attribute 'nothing'" in done.stdout
