"""DFlash (v1) in plain torch: the oracle every engine is held against.

Written to be read. ``model`` is the draft, ``loop`` prefill - draft - verify -
rewind, ``replay`` the same steps along a text that some engine generated.
Paper: DFlash, arXiv 2602.06036. Nothing is imported here; each module imports
torch, so only import them where torch is installed.
"""
