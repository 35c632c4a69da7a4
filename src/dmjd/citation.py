"""The citation of the method, for pages and model cards."""

CITATION = """@article{ma2023dmjd,
  title = {Disjoint Masking with Joint Distillation for Efficient Masked Image Modeling},
  author = {Ma, Xin and Liu, Chang and Xie, Chunyu and Ye, Long and Deng, Yafeng and Ji, Xiangyang},
  journal = {IEEE Transactions on Multimedia},
  year = {2023},
  doi = {10.1109/TMM.2023.3306840},
  note = {arXiv:2301.00230}
}"""
