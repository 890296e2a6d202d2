"""kvpress is imported late, only where it works, and without its side effect on everybody's attention functions."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import textwrap

import pytest
from packaging.version import Version

from kvzip_press import compat, get_press
from kvzip_press.errors import MissingDependencyError

MODEL = """
    import sys
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from kvzip_press import RaggedCache, attach, get_press

    def model(attn):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
                             num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
                             attn_implementation=attn)
        return LlamaForCausalLM(config).eval()

    def read(model, press, token=None):
        cache = DynamicCache()
        with torch.no_grad():
            with press(model):
                model(torch.arange(1, 81)[None], past_key_values=cache)
            return cache, model(torch.tensor([[7]]), past_key_values=cache, position_ids=torch.tensor([[80]])).logits
"""


def run(script: str) -> None:
    source = textwrap.dedent(MODEL) + textwrap.dedent(script)
    environment = {
        **os.environ,
        "TORCHDYNAMO_DISABLE": "1",
    }  # flex_attention as it is written: to compile it takes most
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.kvpress
def test_our_import_of_kvpress_changes_nothing_for_anybody() -> None:
    run("""
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own = lambda *args, **kwargs: sdpa(*args, **kwargs)  # somebody's override
        sdpa = type(ALL_ATTENTION_FUNCTIONS)()["sdpa"]
        before = dict(ALL_ATTENTION_FUNCTIONS)
        import kvzip_press.presses
        assert "kvpress" not in sys.modules
        press = get_press("adakv_snapkv", 0.5, window_size=8)
        assert "kvpress" in sys.modules
        assert dict(ALL_ATTENTION_FUNCTIONS) == before and ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert set(ALL_ATTENTION_FUNCTIONS._local_mapping) == {"sdpa"}
        logits = []
        for attn in ("sdpa", "eager", "flex_attention"):
            with torch.no_grad():
                model(attn)(torch.arange(1, 81)[None])  # somebody else's model
            cache, answer = read(model(attn), press)
            assert abs(RaggedCache.of(cache).kept_fraction - 0.5) < 0.01
            logits.append(answer)
        torch.testing.assert_close(logits[1], logits[0])
        torch.testing.assert_close(logits[2], logits[0])

        import kvpress  # a user's, later: its patch is gone, and what it masks by itself is never seen in silence
        from kvzip_press.errors import CacheMismatchError
        native = kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=8))
        for attn in ("sdpa", "eager"):
            attach(one := model(attn))
            try:
                read(one, native)
            except CacheMismatchError as error:
                assert "wrap the kvpress press in RaggedPress" in str(error)
            else:
                raise AssertionError(attn)
    """)


@pytest.mark.kvpress
def test_a_users_import_of_kvpress_breaks_no_model_of_ours_and_stays_in_force() -> None:
    run("""
        early = {attn: model(attn) for attn in ("sdpa", "eager", "flex_attention")}
        for one in early.values():
            attach(one)  # registers names that kvpress then wraps too
        import kvpress
        wrapped = dict(ALL_ATTENTION_FUNCTIONS)
        from kvzip_press import compat
        gpu = torch.device("cuda")  # on a CPU flex_attention is never called
        assert compat.is_kvpress_wrapper(wrapped["flex_attention"])
        assert not compat.is_kvpress_wrapper(compat.attention_function("flex_attention", gpu))
        assert compat.is_kvpress_wrapper(compat.attention_function("sdpa", gpu))
        press = get_press("adakv_snapkv", 0.5, window_size=8)
        logits = []
        for one in (*early.values(), *map(model, early)):
            cache, answer = read(one, press)
            assert abs(RaggedCache.of(cache).kept_fraction - 0.5) < 0.01
            torch.testing.assert_close(answer, logits[0] if logits else answer)
            logits.append(answer)
        assert dict(ALL_ATTENTION_FUNCTIONS) == wrapped

        native = kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=8))
        for one in (model("sdpa"), early["sdpa"]):  # attached or not: kvpress's fake keys still hide what it masked
            torch.testing.assert_close(read(one, native)[1], logits[0], atol=1e-3, rtol=1e-3)
    """)


def test_absent_kvpress_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match=r"expected kvpress 0\.5\.5 or newer .*5\.3.*found no kvpress"):
        get_press("kvpress_snapkv", 0.5)


@pytest.mark.parametrize(
    ("kvpress", "transformers"),
    [("0.5.5", "5.4.0"), ("0.5.5", "5.3.0"), ("0.5.5", "4.55.4"), ("0.5.3", "5.2.0"), ("0.6.0", "5.2.0")],
)
def test_versions_that_do_not_work_are_named(monkeypatch: pytest.MonkeyPatch, kvpress: str, transformers: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: kvpress)
    monkeypatch.setattr(compat, "TRANSFORMERS_VERSION", Version(transformers))
    with pytest.raises(MissingDependencyError, match=f"found kvpress {kvpress} and transformers {transformers}"):
        get_press("kvpress_snapkv", 0.5)
