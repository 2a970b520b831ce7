"""The short names of licences that the Hub knows.

huggingface_hub has no list of them, so it is kept here, as the Hub's documentation had it in 2025
("Licenses", of repositories). A licence that came later is published as `other`.
"""

GENERAL = """
afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
lgpl-3.0 lgpl-lr lppl-1.3c mit mpl-2.0 ms-pl ncsa ofl-1.1 osl-3.0 postgresql unlicense wtfpl zlib
"""
OF_WORKS_AND_DATA = """
c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 odbl
odc-by pddl
"""
OF_MODELS = """
apple-amlr apple-ascl bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m
creativeml-openrail-m deepfloyd-if-license fair-noncommercial-research-license gemma h-research
intel-research llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 open-mdw openrail openrail++
"""
OTHER = "other"  # has a name and a link in the head of a card
LICENSES = frozenset(f"{GENERAL} {OF_WORKS_AND_DATA} {OF_MODELS}".split()) | {OTHER}
