"""The presses, one per file, each named after its paper.

They are installed as ``kvzip_press.presses``; importing them by the bare name raises.
"""

if not __name__.startswith("kvzip_press."):
    raise ImportError("import kvzip_press.presses; the bare name 'presses' would load a second copy of every class")

from kvzip_press.arguments.named import PressInfo


def _of_kvpress(name: str, summary: str, paper: str, needs: str = "") -> PressInfo:
    """Returns a line about a press of kvpress, which the catalogue makes under the same name, with real eviction."""
    target = f"kvzip_press.presses.kvpress_adapter.catalogue:{name}"
    return PressInfo(name, target, summary, paper, needs, needs_kvpress=True)


def _while_decoding(name: str, press: str, summary: str, paper: str = "", needs: str = "") -> PressInfo:
    """Returns a line about a press that evicts while the model writes, which takes ``budget=TOKENS`` and no ratio."""
    return PressInfo(name, f"kvzip_press.presses.decoding.{press}", summary, paper, needs, takes_ratio=False)


#: Base class of another library -> the press that wraps its objects. The library is not imported to find one.
WRAPPERS = {"kvpress:BasePress": "kvzip_press.presses.kvpress_adapter:RaggedPress"}

_HEAD_SCORES = "scores of the model's heads (`kvzip-press heads compute`)"

#: A line about each press that has a name, and what makes it. Each is imported when it is asked for.
PRESSES = (
    PressInfo(
        "none",
        "kvzip_press.presses.random:NonePress",
        "removes nothing: the reference of every table",
        takes_ratio=False,
    ),
    PressInfo(
        "random", "kvzip_press.presses.random:RandomPress", "removes pairs at random: the baseline of every table"
    ),
    PressInfo(
        "kvzip",
        "kvzip_press.presses.kvzip:KVzipPress",
        "keeps what the model attends to while it repeats the context",
        "2505.23416",
    ),
    PressInfo(
        "kvzip_local",
        "kvzip_press.presses.kvzip:local_press",
        "KVzip whose repetition attends to its own chunk only: linear cost (ours)",
        "2505.23416",
    ),
    PressInfo(
        "kvzip_head",
        "kvzip_press.presses.kvzip_head:KVzipHeadPress",
        "keeps the best heads whole by KVzip's scores; costs nothing at run time",
        "2505.23416",
        _HEAD_SCORES,
    ),
    PressInfo(
        "duo_attention",
        "kvzip_press.presses.duo_attention:DuoAttentionPress",
        "keeps retrieval heads whole, of the others the two ends",
        "2410.10819",
        _HEAD_SCORES,
    ),
    PressInfo(
        "fastkvzip",
        "kvzip_press.presses.fastkvzip:FastKVzipPress",
        "predicts KVzip's scores with a small gate a layer; also while decoding",
        "2601.17668",
        "gates for the model (`kvzip-press gates train`, or the authors')",
    ),
    PressInfo(
        "snapkv",
        "kvzip_press.presses.snapkv:SnapKVPress",
        "the attention of the last tokens of the context",
        "2404.14469",
    ),
    PressInfo(
        "pyramidkv",
        "kvzip_press.presses.snapkv:pyramidkv_press",
        "SnapKV with larger budgets in lower layers",
        "2406.02069",
    ),
    PressInfo(
        "expected_attention",
        "kvzip_press.presses.expected_attention:ExpectedAttentionPress",
        "the attention that future queries are expected to pay",
        "2510.00636",
    ),
    PressInfo(
        "tova",
        "kvzip_press.presses.tova:TOVAPress",
        "the attention of the last token",
        "2401.06104",
    ),
    PressInfo(
        "knorm",
        "kvzip_press.presses.knorm:KnormPress",
        "keeps keys of small norm",
        "2406.11430",
    ),
    PressInfo(
        "keydiff",
        "kvzip_press.presses.keydiff:KeyDiffPress",
        "keeps keys that are unlike the mean key",
        "2504.15364",
    ),
    PressInfo(
        "streaming_llm",
        "kvzip_press.presses.streaming_llm:StreamingLLMPress",
        "keeps the first and the last tokens",
        "2309.17453",
    ),
    _while_decoding(
        "h2o",
        "h2o:H2OPress",
        "while the model writes: the pairs that got most attention so far, and the newest",
        "2306.14048",
    ),
    _while_decoding(
        "knorm_decode",
        "knorm:KnormDecodePress",
        "while the model writes: keys of small norm",
        "2406.11430",
    ),
    _while_decoding(
        "kv_compress",
        "kv_compress:KVCompressPress",
        "while the model writes: squared attention, in whole pages over all heads",
        "2410.00161",
    ),
    _while_decoding(
        "random_decode", "random:RandomDecodePress", "while the model writes: pairs at random, the baseline"
    ),
    _while_decoding(
        "rkv",
        "rkv:RKVPress",
        "while the model writes: pairs that are attended to and that no newer one repeats",
        "2505.24133",
    ),
    _while_decoding(
        "snapkv_decode",
        "snapkv:SnapKVDecodePress",
        "while the model writes: what the last queries attend to",
        "2404.14469",
    ),
    _while_decoding(
        "streaming_llm_decode",
        "streaming_llm:StreamingLLMDecodePress",
        "while the model writes: the first and the newest tokens",
        "2309.17453",
    ),
    _while_decoding(
        "tova_decode",
        "tova:TOVADecodePress",
        "while the model writes: what the last token attends to",
        "2401.06104",
    ),
    _while_decoding(
        "triattention",
        "triattention.tri_press:TriAttentionPress",
        "while the model writes: what the model's mean queries look at",
        "2604.04921",
        "means of the model's queries (`kvzip-press queries calibrate`)",
    ),
    _while_decoding(
        "trimkv",
        "trimkv:TrimKVPress",
        "while the model writes: what gates foresee to be worth keeping longest",
        "2512.03324",
        "gates for the model, as TrimKV's authors release them",
    ),
    _of_kvpress("adakv_expected_attention", "Expected Attention, a layer's budget shared by its heads", "2407.11550"),
    _of_kvpress("adakv_snapkv", "SnapKV, a layer's budget shared by its heads", "2407.11550"),
    _of_kvpress("cap", "keeps values that span the directions which past queries look at", "2604.25975"),
    _of_kvpress("chunkkv_snapkv", "SnapKV's scores, kept or dropped in runs of tokens", "2502.00299"),
    _of_kvpress("compactor", "leverage of keys blended with attention that is not causal", "2507.08143"),
    _of_kvpress("criticaladakv_expected_attention", "AdaKV, scores weighted by the projected values", "2502.03805"),
    _of_kvpress("criticalkv_snapkv", "SnapKV, scores weighted by the projected values", "2502.03805"),
    _of_kvpress("cur", "leverage scores of keys and values", "2509.15038"),
    _of_kvpress("kvcompose", "attention to the context, composite tokens, budgets across layers", "2509.05165"),
    _of_kvpress(
        "kvpress_duo_attention",
        "kvpress's own DuoAttention; its ratio is that of streaming heads",
        "2410.10819",
        "a published pattern for the model",
    ),
    _of_kvpress("kvpress_expected_attention", "kvpress's own Expected Attention", "2510.00636"),
    _of_kvpress("kvpress_fastkvzip", "kvpress's own Fast KVzip", "2601.17668", "published gates for the model"),
    _of_kvpress("kvpress_keydiff", "kvpress's own KeyDiff", "2504.15364"),
    _of_kvpress("kvpress_knorm", "kvpress's own Knorm", "2406.11430"),
    _of_kvpress("kvpress_kvzip", "kvpress's own KVzip", "2505.23416"),
    _of_kvpress("kvpress_pyramidkv", "kvpress's own PyramidKV", "2406.02069"),
    _of_kvpress("kvpress_snapkv", "kvpress's own SnapKV", "2404.14469"),
    _of_kvpress("kvpress_streaming_llm", "kvpress's own StreamingLLM", "2309.17453"),
    _of_kvpress("kvpress_tova", "kvpress's own TOVA", "2401.06104"),
    _of_kvpress("lagkv", "compares each part of the context with the part after it", "2504.04704"),
    _of_kvpress("leverage", "leverage scores of the keys before RoPE (a part of Compactor)", "2507.08143"),
    _of_kvpress(
        "lukv",
        "Expected Attention with budgets a head from measured curves",
        "2602.08585",
        "a published curve for the model",
    ),
    _of_kvpress(
        "observed_attention",
        "the mean attention that a pair received, as in H2O",
        "2306.14048",
        "a model loaded with attn_implementation='eager'",
    ),
    _of_kvpress("qfilter", "projects keys on a learned direction", "2503.02812", "published filters for the model"),
)
