"""What vision models are trained for: several tasks, each with its loss, its accuracy and its pictures.

losses: of each kind of task. boxes: the mathematics of detection. meters: top-1 and top-5, mean intersection
over union, mean average precision (precision). pictures: predictions to look at.
"""

from triptych.training.objectives.vision.meters import VisionMeter
from triptych.training.objectives.vision.objective import VisionObjective

__all__ = ["VisionMeter", "VisionObjective"]
