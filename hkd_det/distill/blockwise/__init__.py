"""Parallel blockwise distillation (Blakeney, Li, Yan, Zong: IEEE TPDS 2021, arXiv 2012.03096).

Every 3x3 convolution of a trained teacher's backbone is replaced by a depthwise-separable block. Each block is trained
alone: its inputs are the activations of the frozen teacher in front of the convolution, its targets the teacher's
outputs behind it. The blocks are independent, so as many are trained at once as there are workers. Afterwards all
blocks are assembled and fine-tuned as one network.

Modules: `blocks` finds the convolutions and assembles the network, `activations` records the inputs, `worker` trains
one block, `config` holds the settings and schedules, `executor` runs the tasks, `method` runs the whole stage.
"""
