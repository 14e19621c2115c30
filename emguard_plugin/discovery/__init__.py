"""Discovery (BLOCK-EM, arXiv 2602.00767): which latents of a sparse autoencoder cause the misaligned behaviour.

| file | what |
|---|---|
| `shift` | stage 1 ranks latents by how far the fine-tune moved them |
| `screen` | stage 2 steers each: induce misalignment in the base, repair the misaligned model; stage 3 finds the strength that each bears |
| `attribution` | ours: gradients in the place of stages 2 and 3 |
| `choose`, `calibrate` | the set, and the yardstick of `coef: auto` |
| `search`, `run`, `job`, `settings` | the stages behind one block, over all blocks, what is asked for, every number |
| `bench`, `kept`, `prompts`, `tally` | what the stages ask: answers under steering, judged and kept; which prompts choose; outcomes counted |
| `plan`, `record`, `examples`, `report` | what the stages will take, and what is written about what they found |

The last two rows stand here since they know the stages' schedule, records or findings, which nobody else needs.
"""

from __future__ import annotations
