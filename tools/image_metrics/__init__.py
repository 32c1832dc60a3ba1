"""How near a set of images is to another: FID, inception-like score, precision and recall, class agreement.

`images` and `data` read sets, `features` runs an extractor over them (`classifier`, `inception`), `fid` and
`scores` are the mathematics; `triptych.tools.evaluate_images` puts them together.
"""
