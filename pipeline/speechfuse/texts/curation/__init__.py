"""Curation: the steps that decide which instruction texts are kept and how they are rewritten.

Each step has a module of its own. YAML names it as speechfuse.texts.STEP.
"""
