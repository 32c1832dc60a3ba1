"""What stands on a vision backbone: one head per task.

dense: maps for segmentation and detection. pooled: a vector per image for classification. contrast: images
against embedded texts.
"""

from triptych.models.heads.contrast import Contrast
from triptych.models.heads.dense import Detect, Segment
from triptych.models.heads.heads import Heads, output_shapes
from triptych.models.heads.pooled import Classify

__all__ = ["Classify", "Contrast", "Detect", "Heads", "Segment", "output_shapes"]
