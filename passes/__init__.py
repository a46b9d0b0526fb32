"""The passes, one file each, in the order in which they run.

    capture, find_sites, insert_masks, schedule_density    prepare
    fold_computed, fold_masks, shrink_dims,
    choose_storage, propagate_layout, lower_matmuls        convert

The folder lies at the top of the repository and is imported as ``mvpfx.passes``. Passes use the
nouns of ``mvpfx`` and never one another; ``mvpfx.api`` strings them together.
"""

if __name__ == "passes":
    raise ImportError(
        "This folder is the package mvpfx.passes and was imported as 'passes'. "
        "Write `import mvpfx.passes` (or `from mvpfx.passes import ...`) instead."
    )
