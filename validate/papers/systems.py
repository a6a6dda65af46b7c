"""The claims of all twelve papers, in the order of the papers' cards."""

from __future__ import annotations

from validate.papers import adapmoe, eep, emoe, fmoe, hexa, hobbit, mc, meo, samoyeds, seer, sida, tsep
from validate.papers.claim import Claim

PAPERS = (sida, samoyeds, hexa, emoe, fmoe, hobbit, mc, adapmoe, eep, seer, meo, tsep)
CLAIMS: tuple[Claim, ...] = tuple(claim for paper in PAPERS for claim in paper.CLAIMS)
