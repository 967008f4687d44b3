"""What the ranks of a run did when: recorded by `train --trace`, and where the time went."""
