#!/usr/bin/env bash
# torch.multinomial (2.13.0, CPU) without replacement draws what has probability 0 once the possible outcomes are used up.
#
# Its documentation asks for as many possible outcomes as are drawn; where there are fewer, ids of probability 0 come
# back without an error or a warning. Sampling with beams draws 2 x beams candidates of
# softmax(scores) in one call: after top-k, a ban or a grammar has left fewer than that, the rest of the candidates are
# tokens that were forbidden, with scores of -inf, and a beam that is short of others goes on with one. Whoever
# draws has to look at the probability of what was drawn.
#
# Seen: of [0.5, 0.5, 0, 0, 0, 0] four are drawn, two of them with probability 0, for every seed; never for one draw.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "numpy==2.4.6"
cat > "$work/draw.py" <<'PY'
import sys

import torch

chances = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]])
impossible = set()
for seed in range(100):
    drawn = torch.multinomial(chances, 4, generator=torch.Generator().manual_seed(seed))
    impossible.add(int((chances.gather(1, drawn) == 0).sum()))
one = sum(
    float(chances[0, int(torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(seed)))]) == 0
    for seed in range(100)
)
print(f"torch {torch.__version__}: of 4 drawn {sorted(impossible)} are impossible; of 100 single draws {one}")
sys.exit(0 if impossible == {2} and one == 0 else 1)
PY
"$work/venv/bin/python" -W ignore "$work/draw.py"
