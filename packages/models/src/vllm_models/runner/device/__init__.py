"""Steps whose state stays on the device, so that the next one is launched before this one is read.

`runner` puts the parts together: `rows` (tokens, tables and sampling of every sequence), `upload`
(one copy to the device per step), `forward` (walking through the layers), `decode` (captured
steps), `step` (what a launched batch owes), `fetch` (the copy back).
"""
