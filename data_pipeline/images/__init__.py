"""Images and latents in WebDataset shards, from tar files to batches, by the rule that text follows too.

config, options     sections and command options      shards, index       tar files, read at random
description         dataset.json of a directory       needs, checks       what the model asks of the data
draws, augment      keyed random choices, pixels      plan                an epoch: grid, buckets, packing
source, rows        one source, its decoded rows      dataset             training and validation data
faults              samples left out                  streaming           URLs, and what holds for them
writing, digits, folder, latents                      the commands `triptych data digits|images|latents`
"""
