"""Peers from PyPI, timed for `peers --python` (src/peer/python.rs).

Reads one JSON object a line on stdin and answers each with one on stdout: first the setup (files of
rows and probes), then turns (a peer, ranges of probes). A package that is not installed is skipped.
"""

import importlib.metadata
import json
import sys
import time

import numpy as np

HNSW_M, HNSW_EF_CONSTRUCTION, HNSW_EF = 16, 100, 200


class FaissFlat:
    name, kind = "PyPI FAISS Flat", "baseline"

    def __init__(self, rows, threads):
        import faiss

        faiss.omp_set_num_threads(threads)
        version = importlib.metadata.version("faiss-cpu")
        self.note = f"PyPI faiss-cpu {version}: {faiss.get_compile_options().strip()}, its own OpenBLAS"
        self.index = faiss.IndexFlatIP(rows.shape[1])
        for first in range(0, len(rows), 16384):
            self.index.add(rows[first : first + 16384].astype(np.float32))

    def search(self, probes, k):
        scores, found = self.index.search(probes, k)
        return found, scores


class USearchExact:
    name, kind = "USearch exact f16", "approximate"

    def __init__(self, rows, threads):
        import usearch.index

        self.call, self.threads, self.rows = usearch.index.search, threads, rows
        self.metric = usearch.index.MetricKind.IP
        self.note = f"PyPI usearch {importlib.metadata.version('usearch')}"

    def search(self, probes, k):
        probes = probes.astype(np.float16)
        found = self.call(self.rows, probes, k, self.metric, exact=True, threads=self.threads)
        keys, distances = np.atleast_2d(found.keys), np.atleast_2d(found.distances)
        return keys.astype(np.int64), 1.0 - distances


class Hnsw:
    name, kind = f"hnswlib M={HNSW_M} ef={HNSW_EF}", "approximate"

    def __init__(self, rows, threads):
        import hnswlib

        self.note = f"PyPI hnswlib {importlib.metadata.version('hnswlib')}"
        self.index = hnswlib.Index(space="ip", dim=rows.shape[1])
        self.index.init_index(max_elements=len(rows), ef_construction=HNSW_EF_CONSTRUCTION, M=HNSW_M)
        self.index.set_num_threads(threads)
        for first in range(0, len(rows), 16384):
            self.index.add_items(rows[first : first + 16384].astype(np.float32))
        self.index.set_ef(HNSW_EF)

    def search(self, probes, k):
        found, distances = self.index.knn_query(probes, k=k)
        return found.astype(np.int64), 1.0 - distances


def main():
    lines = iter(sys.stdin)
    setup = json.loads(next(lines))
    dim = setup["dim"]
    rows = np.fromfile(setup["rows"], dtype=np.float16).reshape(-1, dim)
    probes = np.fromfile(setup["probes"], dtype=np.float32).reshape(-1, dim)
    peers, skipped = {}, []
    for kind in (FaissFlat, USearchExact, Hnsw):
        if kind is Hnsw and not setup["hnsw"]:
            skipped.append({"name": kind.name, "reason": "its graph takes long to build; --hnsw builds it"})
            continue
        try:
            peers[kind.name] = kind(rows, setup["threads"])
        except ImportError as error:
            skipped.append({"name": kind.name, "reason": str(error)})
    say(
        {
            "peers": [{"name": peer.name, "kind": peer.kind} for peer in peers.values()],
            "skipped": skipped,
            "notes": [peer.note for peer in peers.values()],
        }
    )
    for line in lines:
        turn = json.loads(line)
        peer, answer = peers[turn["peer"]], {"seconds": [], "rows": [], "scores": []}
        for first, end in turn["calls"]:
            began = time.perf_counter()
            found, scores = peer.search(probes[first:end], turn["k"])
            answer["seconds"].append(time.perf_counter() - began)
            answer["rows"].append(found.tolist())
            answer["scores"].append(scores.tolist())
        say(answer)


def say(answer):
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
