"""A bundle behind HTTP: requests at different steps share the calls of the UNet.

    front (this process)                          worker (one process for each device)
    HTTP -> fields -> task of n orders --order--> plan -> queue -> slots -> step by step -> decode -> encode
                            <-- accepted, moved, finished, failed --

An order is one picture. The worker's only engine thread moves the orders that are in its slots; see `loop`. The front
never computes: it reads requests, waits, and sends events on. A worker that dies is started again, and its orders are
made again, each the same picture, because the front drew the seed.
"""
