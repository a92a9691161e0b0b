"""The recipe that makes a draft for a target: today its core, :func:`~.fit.fit`.

``draft`` is the trainable draft, ``features`` the frozen target it is conditioned on,
``fit`` the loop, ``export`` the folder in the published format. Each module imports
torch; the reference stays the oracle that a trained draft is held against.
"""
