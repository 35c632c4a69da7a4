"""Plain forms: what other programs compute in a step, as they compute it, on the weights of our models.

`hybrid` is the released program of the paper: whole maps, every token through every block, its HOG and its losses.
`mae` has the MAE of transformers, and lightly's. All take what our models take, images and the numbers of tokens.
"""
