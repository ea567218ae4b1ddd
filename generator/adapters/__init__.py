"""Released generator files -> our state dicts and back; one adapter per registered generator."""

from generator.adapters import dit_dh, far, gpt, rar, var

ADAPTERS = {"dit_dh": dit_dh.ADAPTER, "far": far.ADAPTER, "gpt": gpt.ADAPTER, "rar": rar.ADAPTER, "var": var.ADAPTER}
