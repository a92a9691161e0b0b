"""The whole recipe, from prompts to a published draft: ``dflash-plugin train``.

Stages, each resumable and each alone too: ``prompts`` -> ``regenerate`` (the target's own
answers) -> ``features`` (its tapped hidden states) -> ``fit`` -> ``evaluate`` -> ``export``.
``config`` is the file that describes a run, ``run`` knows the order; everything lies in one
output folder. The core beside this package (``draft``, ``features``, ``fit``, ``export``) is
what trains the tiny replicas too.
"""
