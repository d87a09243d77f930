"""Capacity-dynamic distillation (Xie et al. 2023): a student that begins wide and sheds channels while it learns.

settings: what a recipe says. compactor: where a channel's importance lies. terms: what the teacher asks of the student.
people, gallery, response, evidence: which channels people need. ledger: what widths cost. shrinking: which go and
when. lasso: how a channel fades. folding: the plain network at the end.
"""
