"""Trials that break runs on purpose: kills, full disks, flipped bits, files of users in the way, and damaged input.

`python -m tests.faults --help` lists them. Every trial has a number, and what it does follows from that number and the
seed alone, so the command that is printed for one that failed does it again.
"""
