"""Evaluation: mteb's tasks and metrics over local folders, held-out files of training pairs, and ablations.

    epic-rag eval --data FOLDER --model epic-minilm --num-demonstrations 0,8
    epic-rag ablate GRID.yaml

`runner` runs an evaluation; it uses `datasets` (local sets), `heldout` (tests made of pairs), `mteb`, `bm25` and
`report`. `embedding_store` caches vectors for all of them. `ablation` trains and scores the arms of a grid. Only the
module `mteb` imports mteb (`pip install 'epic-rag[eval]'`). Import names from the modules.
"""
