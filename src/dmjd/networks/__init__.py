"""Networks for dense tasks around any backbone; they need the extra `dense`.

segmenter   UPerNet
detector    Faster R-CNN or Mask R-CNN
around      what both share: build the backbone's pyramid, tell heads from backbone, train and save
"""
