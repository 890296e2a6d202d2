"""The presses, one per file, each named after its paper.

They are installed as ``kvzip_press.presses``; importing them by the bare name raises.
"""

if not __name__.startswith("kvzip_press."):
    raise ImportError("import kvzip_press.presses; the bare name 'presses' would load a second copy of every class")

#: Name -> "module:Callable", resolved by :mod:`kvzip_press.registry` when a press is asked for.
PRESSES = {
    "none": "kvzip_press.presses.random:NonePress",
    "random": "kvzip_press.presses.random:RandomPress",
    "kvzip": "kvzip_press.presses.kvzip:KVzipPress",
    "kvzip_local": "kvzip_press.presses.kvzip:local_press",
    "kvzip_head": "kvzip_press.presses.kvzip_head:KVzipHeadPress",
    "duo_attention": "kvzip_press.presses.duo_attention:DuoAttentionPress",
    "fastkvzip": "kvzip_press.presses.fastkvzip:FastKVzipPress",
    # kvpress's, with real eviction; the attribute of the catalogue is the name
    **{
        name: f"kvzip_press.presses.kvpress_adapter.catalogue:{name}"
        for name in (
            "adakv_expected_attention",
            "adakv_snapkv",
            "cap",
            "chunkkv_snapkv",
            "compactor",
            "criticaladakv_expected_attention",
            "criticalkv_snapkv",
            "cur",
            "expected_attention",
            "keydiff",
            "knorm",
            "kvcompose",
            "kvpress_duo_attention",
            "kvpress_fastkvzip",
            "kvpress_kvzip",
            "lagkv",
            "leverage",
            "lukv",
            "observed_attention",
            "pyramidkv",
            "qfilter",
            "snapkv",
            "streaming_llm",
            "tova",
        )
    },
}
