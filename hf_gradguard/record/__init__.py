"""The run record: append-only, readable while it is written, and after `kill -9` at any moment.

Each attempt at a run (a start, a resume, a change of what is trained) is a directory `segment-0000`, `segment-0001` …:

- `layout.json.gz`: which parameter belongs to which layer;
- `run.json`: what was run. Written whole, and last of the two: a directory without it is no segment yet;
- `windows.arrow`: one row a window, an Arrow IPC stream. Norms are float32, −1 where there was no gradient;
- `weights.arrow`: weight norms and update-to-weight ratios by group, at the few steps where they were measured;
- `accumulation.arrow`: only where a policy decides when the optimizer steps: one row a window on what is held;
- `time_profiles.arrow`: only where they are measured: how far back in time the gradient reaches, one row a lag;
- `events.jsonl`: one line an event;
- `end.json`: how it ended. Missing while it runs and after a kill.

Size: at most 4 bytes a parameter a window, 64 bytes a window (112 with `accumulation.arrow`) and 64 kB in all. Flushing
by time keeps to that by itself: it waits where training is so slow that the frame of each flush (about 1 kB) would not
be covered. What comes on top is that frame for each `flush` asked for by hand, a `run.json` of more than some 40 kB,
events without end, and about 100 bytes for each window that a policy defers or clips: such an event may come in every
window, so it counts towards no limit and is written with the windows; all other events are written at once. So are time
profiles, at most 56 bytes a lag and a frame each, which count towards no limit either.

With `record_every="auto"`, windows × parameters × 4 bytes may grow to 128 MB, then every 2nd window keeps its
parameters until 128 MB more are there, then every 4th …; the norm of every group is there for every window. So 10,000
windows of 16,000 parameters in 1,000 layers take 315 MB in place of 640 (measured).
"""
