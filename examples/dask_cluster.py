"""A Dask cluster's worker processes as the seats of a pool: here one of this machine, which comes and goes.

python examples/dask_cluster.py
"""

from pathlib import Path

from distributed import LocalCluster

from mp_rerank import RerankerPool

PASSAGES = (Path(__file__).parent / "berlin.txt").read_text().splitlines()
QUESTION = "Where was currywurst invented?"

if __name__ == "__main__":  # Dask's own processes run this module
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        RerankerPool(cluster=cluster) as pool,
    ):
        [best] = pool.rerank(QUESTION, PASSAGES, top_n=1)
        print(f"{QUESTION}\n  {best.relevance_score:.3f}  {best.document}")
        for worker in pool.workers():
            print(f"worker {worker.slot}: {worker.state}, in {worker.place}")

        futures = [pool.submit(QUESTION, PASSAGES) for _ in range(20)]
        cluster.scale(1)  # one of the two leaves, once it has finished its slice
        assert {future.result()[0].index for future in futures} == {best.index}
        print(f"{pool.stats().completed} requests answered, {pool.stats().failed} failed")
