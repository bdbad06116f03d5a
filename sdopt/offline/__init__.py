"""Lists of requests into folders of pictures: resumable, one picture for each id, by one process, several, or Ray.

    list -> lines -> those without a picture --order--> a step loop --picture--> FOLDER/ID-DIGEST.png
    (lines)          (run)                              (makers, actors)          (folders)

A line names a picture by its id. The digest in the name is of all that decides the picture, so a line that was changed
is made again. A picture appears by one rename. Nothing else says what is done, so a run that was killed is resumed by
the same command.

From Python: `sdopt.offline.make(pipe, requests, folder)`.
"""

from sdopt.offline.run import Outcome, Run, make

__all__ = ["Outcome", "Run", "make"]
