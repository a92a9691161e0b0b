"""What ``ci.replicas`` runs in an environment with torch to build one tiny pair.

``language`` alone is plain Python: the harness makes its prompts with it.
"""
