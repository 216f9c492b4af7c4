"""The data engine: from captions and boxes to instruction data (LLaVA §3 and appendix)."""
