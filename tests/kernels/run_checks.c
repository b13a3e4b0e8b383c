/* Checks of cython/core/run.c that no Python sees: `run_checks NAME`; the exit status is 0 if all is right. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "path.h"

enum { CAPACITY = 3, ITEMS = 100, THREADS = 5 };

static atomic_int failures;

static void check(int right, const char *what) {
    if (right) return;
    fprintf(stderr, "wrong: %s\n", what);
    failures++;
}

/* --- steps --- */

static atomic_long ran;
static mk_work work;

static void run_items(const void *job, long begin, long end) {
    (void)job;
    atomic_fetch_add(&ran, end - begin);
}

/* Add this many steps of two items each, run them, and return what mk_run says. */
static int run_steps(long count) {
    atomic_store(&ran, 0);
    for (long i = 0; i < count; i++) mk_step_of(&work, run_items, 2, 1, 0)->small = (mk_small_job){.d = i};
    return mk_run(&work, 1);
}

static void steps(void) {
    static mk_step list[CAPACITY + 2], untouched[2];
    memset(untouched, 0x5A, sizeof untouched);
    memcpy(list + CAPACITY, untouched, sizeof untouched);

    mk_begin_in(&work, list, CAPACITY);
    check(!run_steps(CAPACITY) && ran == 2 * CAPACITY, "a full list of the caller's runs");
    for (long more = 1; more < 60; more += 19) {
        mk_begin_in(&work, list, CAPACITY);
        check(run_steps(CAPACITY + more) == MK_TOO_MANY_STEPS, "a step more than the caller's list holds is an error");
        check(!ran, "no step of a failed work runs");
        check(!memcmp(list + CAPACITY, untouched, sizeof untouched), "nothing is written beyond the caller's list");
    }
    mk_begin_in(&work, list, 0);
    check(run_steps(1) == MK_TOO_MANY_STEPS, "an empty list holds nothing");

    check(!run_steps(MK_STEPS) && ran == 2 * MK_STEPS, "a failed work can be filled again, up to its own list's end");
    check(run_steps(MK_STEPS + 1) == MK_TOO_MANY_STEPS && !ran, "a step more than the own list holds is an error");
    check(!run_steps(1) && ran == 2, "and the work can be filled again");
}

/* --- threads --- */

enum { SETS = 20, CELLS = (2 * SETS + 2) * ITEMS };

/* Row `out` of cells becomes one more than the mirrored row `a`, which an earlier set has made. */
static void mirror(const void *argument, long begin, long end) {
    const mk_small_job *job = argument;
    for (long i = begin; i < end; i++) {
        for (volatile int wait = 0; wait < 100; wait++) {}
        job->out[i] += 1.0f + job->a[ITEMS - 1 - i] * (float)(i % 3);
    }
}

/* Sets of two joined steps, each of which needs the set before it. */
static void fill(float *cells, int threads) {
    mk_work own;
    memset(cells, 0, CELLS * sizeof *cells);
    mk_begin(&own);
    for (int row = 2; row < 2 * SETS + 2; row++) {
        mk_join(&own, row % 2);
        mk_step_of(&own, mirror, ITEMS, 1, row % 3 == 0)->small =
            (mk_small_job){.a = cells + ((row ^ 1) - 2) * ITEMS, .out = cells + row * ITEMS};
    }
    check(!mk_run(&own, threads), "the work runs");
}

static int same(int threads) {
    float alone[CELLS], together[CELLS];
    fill(alone, 1);
    fill(together, threads);
    return !memcmp(alone, together, sizeof alone);
}

static void threads(void) {
    for (int n = 1; n <= THREADS; n++)
        for (int i = 0; i < 50; i++) check(same(n), "any number of threads gives the same");
}

static void *call(void *argument) {
    for (int i = 0; i < 50; i++) check(same(THREADS), "callers at the same time get what each would alone");
    return argument;
}

static void callers(void) {
    pthread_t other[2];
    for (int i = 0; i < 2; i++) pthread_create(&other[i], NULL, call, NULL);
    call(NULL);
    for (int i = 0; i < 2; i++) pthread_join(other[i], NULL);
}

static void forks(void) {
    for (int i = 0, status; i < 4; i++) { /* the first child has a parent without threads, the others one with some */
        pid_t child = fork();
        if (!child) {
            alarm(60);
            check(same(THREADS), "a child computes what its parent does");
            _exit(failures);
        }
        check(waitpid(child, &status, 0) == child && !status, "the child of a fork ends well");
        check(same(THREADS), "the parent goes on");
    }
}

/* A part that needs a large stack, as AMX does. */
static void use_stack(const void *argument, long begin, long end) {
    volatile char block[800 * 1024];
    for (size_t i = sizeof block; i > 1024; i -= 1024) block[i - 1] = 0; /* from the top, so that the guard page is hit */
    mirror(argument, begin, end);
}

static void stacks(void) { /* run with a small OMP_STACKSIZE */
    float cells[2 * ITEMS] = {0};
    mk_begin(&work);
    for (int run = 1; run <= 100; run++) {
        for (int i = 0; i < 10; i++)
            mk_step_of(&work, use_stack, ITEMS, 1, 0)->small = (mk_small_job){.a = cells, .out = cells + ITEMS};
        check(!mk_run(&work, THREADS) && cells[ITEMS] == 10.0f * run, "a thread with too small a stack does no part");
    }
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } all[] = {
        {"steps", steps}, {"threads", threads}, {"callers", callers}, {"forks", forks}, {"stacks", stacks}};
    for (size_t i = 0; argc == 2 && i < sizeof all / sizeof *all; i++)
        if (!strcmp(argv[1], all[i].name)) {
            all[i].run();
            return failures > 0;
        }
    return 2;
}
