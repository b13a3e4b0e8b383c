/* Threads: the only place that knows them, and it does without where there are none.
 *
 * A pool of helpers, started by the first run that wants them, takes parts of a step beside the caller.  The caller
 * waits for parts that were taken, never for a helper: one that sleeps, or whose core is busy with something else,
 * holds nobody up.  A second caller at the same time (the weight cache reads ahead) works alone. */
#include <stdlib.h>
#include <string.h>

#include "path.h"

enum { PARTS = 4 /* for each thread, so that a slow one gets fewer */ };

static atomic_int regions;
static atomic_long weights_read;

int mk_regions(void) { return atomic_load(&regions); }
long mk_weights_read(void) { return atomic_load(&weights_read); }

void mk_begin(mk_work *work) {
    mk_begin_in(work, work->own, MK_STEPS);
}

void mk_begin_in(mk_work *work, mk_step *steps, long capacity) {
    work->steps = steps;
    work->capacity = capacity;
    work->last = &work->spare;
    work->count = work->joining = work->failed = 0;
    work->weights = 0;
    work->groups = NULL;
}

void mk_join(mk_work *work, int on) { work->joining = on; }

mk_job *mk_step_of(mk_work *work, mk_range range, long items, long grain, int uneven) {
    mk_step *step = &work->spare;
    if (work->count < work->capacity) step = &work->steps[work->count++];
    else work->failed = MK_TOO_MANY_STEPS; /* the spare step is written and never run */
    work->last = step;
    step->range = range;
    step->items = items;
    step->grain = grain;
    step->least = 0;
    step->uneven = uneven;
    step->joined = work->joining;
    memset(&step->job, 0, sizeof step->job);
    return &step->job;
}

static void do_part(mk_step *step, long part) {
    long grains = mk_blocks(step->items, (int)step->grain), end = grains * (part + 1) / step->parts * step->grain;
    step->range(&step->job, grains * part / step->parts * step->grain, end < step->items ? end : step->items);
}

/* Do one part of what may be done now; 0 if all are taken. */
static int take_part(mk_work *work) {
    long now = atomic_load(&work->now), low = 0;
    if (now < 0) return 0;
    mk_step *set = &work->steps[now];
    if (atomic_load(&set->next) >= set->all) return 0;
    long part = atomic_fetch_add(&set->next, 1);
    if (part >= set->all) return 0;
    for (long high = set->set; high - low > 1;) { /* the last step that begins with this part or before it */
        long middle = (low + high) / 2;
        if (set[middle].before <= part) low = middle;
        else high = middle;
    }
    do_part(&set[low], part - set[low].before);
    atomic_fetch_add(&work->done, 1);
    return 1;
}

#ifndef _WIN32
#include <pthread.h>
#include <sched.h>

/* Spins of about 50 ns: how long an idle helper looks for the next step before it sleeps. */
enum { MOST = 255, SPINS = 4000, YIELD = 64, STACK = 2 * 1024 * 1024 };

static struct {
    pthread_mutex_t busy, asleep; /* busy: held by the caller whose work it is */
    pthread_cond_t wake;
    int helpers, spins;
    atomic_int sleepers, inside; /* inside: helpers that may be looking at the work */
    atomic_uint signal;          /* changes when there are new parts */
    mk_work *_Atomic work;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .asleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void relax(int spin) {
    if (spin % YIELD == YIELD - 1) sched_yield();
#ifdef MK_X86
    else __builtin_ia32_pause();
#elif defined(MK_ARM)
    else __asm__ volatile("yield");
#endif
}

static void *help(void *argument) {
    int number = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int spin = 0; spin < pool.spins && atomic_load(&pool.signal) == seen; spin++) relax(spin);
        if (atomic_load(&pool.signal) == seen) {
            pthread_mutex_lock(&pool.asleep);
            atomic_fetch_add(&pool.sleepers, 1);
            while (atomic_load(&pool.signal) == seen) pthread_cond_wait(&pool.wake, &pool.asleep);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.asleep);
        }
        seen = atomic_load(&pool.signal);
        for (int more = 1; more;) { /* the caller takes its work back first, and then waits for those inside */
            atomic_fetch_add(&pool.inside, 1);
            mk_work *work = atomic_load(&pool.work);
            more = work && number < work->helpers && take_part(work);
            atomic_fetch_sub(&pool.inside, 1);
        }
    }
    return NULL;
}

static void forget(void) { /* in the child of a fork there are no helpers */
    pthread_mutex_init(&pool.busy, NULL);
    pthread_mutex_init(&pool.asleep, NULL);
    pthread_cond_init(&pool.wake, NULL);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.inside, 0);
    atomic_store(&pool.work, NULL);
    pool.helpers = 0;
}

/* Have so many helpers, or as many as there can be. */
static void start(int helpers) {
    static int prepared;
    if (!prepared) {
        const char *policy = getenv("OMP_WAIT_POLICY"); /* passive: others need the cores (comm/cores.py) */
        pool.spins = policy && (*policy == 'p' || *policy == 'P') ? 0 : SPINS;
        prepared = !pthread_atfork(NULL, NULL, forget);
    }
    pthread_attr_t attributes; /* attention keeps blocks on the stack; some systems give threads 128 KiB */
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (; pool.helpers < helpers; pool.helpers++) {
        pthread_t thread;
        if (pthread_create(&thread, &attributes, help, (void *)(intptr_t)pool.helpers)) break;
    }
    pthread_attr_destroy(&attributes);
}

static void announce(void) {
    atomic_fetch_add(&pool.signal, 1);
    if (!atomic_load(&pool.sleepers)) return;
    pthread_mutex_lock(&pool.asleep);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.asleep);
}

static int open_pool(mk_work *work) {
    if (pthread_mutex_trylock(&pool.busy)) return 0;
    start(work->helpers < MOST ? work->helpers : MOST);
    atomic_store(&pool.work, work);
    return 1;
}

static void close_pool(void) {
    atomic_store(&pool.work, NULL);
    for (int spin = 0; atomic_load(&pool.inside); spin++) relax(spin);
    pthread_mutex_unlock(&pool.busy);
}

static void wait_for(mk_work *work, long parts) {
    for (int spin = 0; atomic_load(&work->done) < parts; spin++) relax(spin);
}
#else
static int open_pool(mk_work *work) { (void)work; return 0; }
static void close_pool(void) {}
static void announce(void) {}
static void wait_for(mk_work *work, long parts) { (void)work; (void)parts; }
#endif

static void run_alone(mk_work *work) {
    for (mk_step *step = work->steps; step < work->steps + work->count; step++)
        if (step->items > 0) step->range(&step->job, 0, step->items);
}

static void run_together(mk_work *work) {
    for (long now = 0; now < work->count; now += work->steps[now].set) {
        const long parts = work->steps[now].all;
        atomic_store(&work->done, 0);
        atomic_store(&work->now, now);
        if (parts > 1) announce();
        while (take_part(work)) {}
        wait_for(work, parts);
    }
}

/* Cut the steps into parts; nothing may be taken yet. */
static void prepare(mk_work *work, int threads) {
    work->helpers = threads - 1;
    atomic_store(&work->now, -1);
    for (mk_step *step = work->steps, *set = step; step < work->steps + work->count; step++) {
        long parts = step->uneven ? step->items : PARTS * (long)threads;
        while (parts > threads && step->items < parts * step->least) parts -= threads;
        step->parts = step->items > 0 ? mk_blocks(step->items, (int)step->grain) : 0;
        if (step->parts > parts) step->parts = parts;
        if (!step->joined || step == work->steps) {
            set = step;
            set->set = set->all = 0;
            atomic_store(&set->next, 0);
        }
        step->before = set->all;
        set->set++;
        set->all += step->parts;
    }
}

int mk_run(mk_work *work, int threads) {
    int failed = work->failed;
    atomic_fetch_add(&regions, 1);
    atomic_fetch_add(&weights_read, work->weights);
    if (!failed) {
        prepare(work, threads);
        if (threads > 1 && open_pool(work)) {
            run_together(work);
            close_pool();
        } else {
            run_alone(work);
        }
    }
    free(work->groups);
    mk_begin(work);
    return failed;
}
