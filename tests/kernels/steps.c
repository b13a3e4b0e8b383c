/* What becomes of a work to which more steps are added than its list holds; the exit status is 0 if all is right. */
#include <stdio.h>
#include <string.h>

#include "path.h"

enum { CAPACITY = 3 };

static long ran;
static int failures;
static mk_work work;

static void check(int right, const char *what) {
    if (right) return;
    fprintf(stderr, "wrong: %s\n", what);
    failures++;
}

static void run_items(const void *job, long begin, long end) {
    (void)job;
    ran += end - begin;
}

/* Add this many steps of two items each, run them, and return what mk_run says. */
static int run_steps(long count) {
    ran = 0;
    for (long i = 0; i < count; i++) mk_step_of(&work, run_items, 2, 1, 0)->small = (mk_small_job){.d = i};
    return mk_run(&work, 1);
}

int main(void) {
    static mk_step steps[CAPACITY + 2], untouched[2];
    memset(untouched, 0x5A, sizeof untouched);
    memcpy(steps + CAPACITY, untouched, sizeof untouched);

    mk_begin_in(&work, steps, CAPACITY);
    check(!run_steps(CAPACITY) && ran == 2 * CAPACITY, "a full list of the caller's runs");
    for (long more = 1; more < 60; more += 19) {
        mk_begin_in(&work, steps, CAPACITY);
        check(run_steps(CAPACITY + more) == MK_TOO_MANY_STEPS, "one step more than the caller's list holds is an error");
        check(!ran, "no step of a failed work runs");
        check(!memcmp(steps + CAPACITY, untouched, sizeof untouched), "nothing is written beyond the caller's list");
    }
    mk_begin_in(&work, steps, 0);
    check(run_steps(1) == MK_TOO_MANY_STEPS, "an empty list holds nothing");

    check(!run_steps(MK_STEPS) && ran == 2 * MK_STEPS, "a failed work can be filled again, up to its own list's end");
    check(run_steps(MK_STEPS + 1) == MK_TOO_MANY_STEPS && !ran, "one step more than the own list holds is an error");
    check(!run_steps(1) && ran == 2, "and the work can be filled again");
    return failures > 0;
}
