/* Runs the steps of a work with OpenMP threads; no other file starts threads.  Without OpenMP it uses one thread.
 *
 * A call is one parallel region.  Thread 0, the caller, announces one set of steps after the other, and all threads take
 * parts of the announced set.  A set of one part is computed by the caller.  The caller waits for parts that others have taken,
 * and waits for threads only at the end of the region.  A second call at the same time (from a thread that reads ahead) is
 * computed by its caller alone. */
#define _GNU_SOURCE /* pthread_getattr_np */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "path.h"

enum { PARTS = 4 /* parts per thread, so that a slow thread takes fewer */ };

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

long mk_capacity(const mk_work *work) { return work->capacity; }

void mk_join(mk_work *work, int on) { work->joining = on; }

mk_job *mk_step_of(mk_work *work, mk_range range, long items, long grain, int uneven) {
    mk_step *step = &work->spare;
    if (work->count < work->capacity) step = &work->steps[work->count++];
    else work->failed = MK_TOO_MANY_STEPS; /* the caller fills the spare step, which is never run */
    work->last = step;
    step->range = range;
    step->items = items;
    step->grain = grain;
    step->minimum = 0;
    step->uneven = uneven;
    step->joined = work->joining;
    memset(&step->job, 0, sizeof step->job);
    return &step->job;
}

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#include <sched.h>

/* A thread spins this often, about 50 ns each, before it sleeps.  comm/cores.py lets libgomp spin as long between
 * regions. */
enum { SPINS = 4000, YIELD = 64, STACK = 1 << 20 };

/* If other programs use the cores, a region waits at its end for threads that start too late to help.  After IN_VAIN
 * consecutive regions of at least SHORT nanoseconds without help, the next ALONE calls are computed by the caller alone. */
enum { SHORT = 20000, IN_VAIN = 4, ALONE = 32 };

static struct {
    atomic_int busy; /* a region is open */
    int alone;       /* no regions in this process, because it was forked from one that had regions */
    int prepared, spins;
    int threads; /* the number of threads that have been started before, and so can be started */
    int in_vain, calls_alone;
    atomic_int helped; /* a thread other than the caller took a part */
    pthread_mutex_t asleep;
    pthread_cond_t wake;
    atomic_int sleepers;
} team = {.asleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void relax(int spin) {
    if (spin % YIELD == YIELD - 1) sched_yield();
#ifdef MK_X86
    else __builtin_ia32_pause();
#elif defined(MK_ARM)
    else __asm__ volatile("yield");
#endif
}

/* The child of a fork does not have its parent's threads, but libgomp would wait for them. */
static void forget_threads(void) { team.alone = 1; }

/* Reserve the threads for the caller, which releases them with close_region; returns 0 if they are in use. */
static int claim_team(void) {
    if (team.alone || atomic_exchange(&team.busy, 1)) return 0;
    if (!team.prepared) {
        const char *policy = getenv("OMP_WAIT_POLICY"); /* passive: others need the cores (comm/cores.py) */
        team.spins = policy && (*policy == 'p' || *policy == 'P') ? 0 : SPINS;
        team.prepared = !pthread_atfork(NULL, NULL, forget_threads);
    }
    if (!team.prepared) atomic_store(&team.busy, 0);
    return team.prepared;
}

static void close_region(void) { atomic_store(&team.busy, 0); }

static void *wait_for(void *mutex) {
    pthread_mutex_lock(mutex);
    pthread_mutex_unlock(mutex);
    return NULL;
}

/* Whether `threads` threads can be started.  libgomp ends the process if one cannot (ulimit -u or -v, or a limit of the
 * cgroup), so they are started and joined once before libgomp starts its own.  The caller has reserved the threads. */
static int threads_start(int threads) {
    if (threads <= team.threads) return 1;
    pthread_mutex_t ends = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *started = malloc((size_t)threads * sizeof *started);
    int count = 1; /* the caller */
    pthread_mutex_lock(&ends);
    while (started && count < threads && !pthread_create(&started[count], NULL, wait_for, &ends)) count++;
    pthread_mutex_unlock(&ends);
    for (int i = 1; i < count; i++) pthread_join(started[i], NULL);
    free(started);
    if (count == threads) team.threads = threads;
    return count == threads;
}

/* Whether this call may open a region; it may not while calls are computed by their callers alone. */
static int open_region(void) {
    if (!claim_team()) return 0;
    if (!team.calls_alone) return 1;
    team.calls_alone--;
    close_region();
    return 0;
}

/* Whether this thread's stack is large enough for the kernels' arrays (AMX needs 800 KB); OMP_STACKSIZE may limit it. */
static int has_stack(void) {
#ifdef __linux__
    static _Thread_local size_t size;
    pthread_attr_t attributes;
    void *end;
    if (!size && !pthread_getattr_np(pthread_self(), &attributes)) {
        pthread_attr_getstack(&attributes, &end, &size);
        pthread_attr_destroy(&attributes);
    }
    return size >= STACK;
#else
    return 1;
#endif
}

/* Announce set `now` to all threads, and wake those that sleep. */
static void announce(mk_work *work, long now) {
    atomic_store(&work->now, now);
    if (!atomic_load(&team.sleepers)) return;
    pthread_mutex_lock(&team.asleep);
    pthread_cond_broadcast(&team.wake);
    pthread_mutex_unlock(&team.asleep);
}

/* Wait for the set that is announced after set `seen`, and return it. */
static long next_set(mk_work *work, long seen) {
    for (int spin = 0; spin < team.spins && atomic_load(&work->now) == seen; spin++) relax(spin);
    if (atomic_load(&work->now) == seen) {
        pthread_mutex_lock(&team.asleep);
        atomic_fetch_add(&team.sleepers, 1);
        while (atomic_load(&work->now) == seen) pthread_cond_wait(&team.wake, &team.asleep);
        atomic_fetch_sub(&team.sleepers, 1);
        pthread_mutex_unlock(&team.asleep);
    }
    return atomic_load(&work->now);
}

static void do_part(mk_step *step, long part) {
    long grains = mk_blocks(step->items, (int)step->grain), end = grains * (part + 1) / step->parts * step->grain;
    step->range(&step->job, grains * part / step->parts * step->grain, end < step->items ? end : step->items);
}

/* Compute parts of the announced set; returns their number, 0 if all are taken.  A thread takes several at once while many are
 * left, for the counter comes from another core each time, but half of its share: its core may be slower or shared. */
static long take_parts(mk_work *work) {
    const long now = atomic_load(&work->now);
    if (now < 0 || now == work->count) return 0;
    mk_step *set = &work->steps[now];
    const long left = set->all - atomic_load(&set->next);
    if (left <= 0) return 0;
    const long count = set->uneven ? 1 : mk_blocks(left, 2 * omp_get_num_threads());
    const long first = atomic_fetch_add(&set->next, count);
    const long end = first + count < set->all ? first + count : set->all;
    for (long part = first; part < end; part++) {
        long low = 0;
        for (long high = set->set; high - low > 1;) { /* the last step that begins with this part or before it */
            long middle = (low + high) / 2;
            if (set[middle].before <= part) low = middle;
            else high = middle;
        }
        do_part(&set[low], part - set[low].before);
    }
    return first < end ? end - first : 0;
}

static void help(mk_work *work) {
    for (long now = -1; (now = next_set(work, now)) < work->count;)
        for (long count; (count = take_parts(work));) {
            atomic_fetch_add(&work->done, count);
            atomic_store(&team.helped, 1);
        }
}

static long clock_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000l + time.tv_nsec;
}

/* Returns the nanoseconds that the sets took. */
static long lead(mk_work *work) {
    const long began = clock_now();
    for (long now = 0; now < work->count; now += work->steps[now].set) {
        const long parts = work->steps[now].all;
        if (parts <= 1) { /* another thread would hear of it after it is done */
            for (mk_step *step = work->steps + now; step < work->steps + now + work->steps[now].set; step++)
                if (step->parts) do_part(step, 0);
            continue;
        }
        atomic_store(&work->done, 0);
        announce(work, now);
        long others = parts;
        for (long count; (count = take_parts(work));) others -= count;
        for (int spin = 0; atomic_load(&work->done) < others; spin++) relax(spin);
    }
    announce(work, work->count);
    return clock_now() - began;
}

static int run_together(mk_work *work, int threads) {
    if (!threads_start(threads)) return MK_NO_THREADS;
    long nanoseconds = 0;
    atomic_store(&team.helped, 0);
#pragma omp parallel num_threads(threads)
    {
        if (!omp_get_thread_num()) nanoseconds = lead(work);
        else if (has_stack()) help(work);
    }
    if (atomic_load(&team.helped)) team.in_vain = 0;
    else if (nanoseconds >= SHORT && ++team.in_vain == IN_VAIN) team.in_vain = 0, team.calls_alone = ALONE;
    return 0;
}

void mk_first_touch(uint8_t *memory, long bytes, int threads) {
    enum { CHUNK = 1 << 21 /* a huge page */, PAGE = 4096 };
    if (!claim_team()) return;
    if (!threads_start(threads)) threads = 1; /* the next mk_run reports it */
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long begin = 0; begin < bytes; begin += CHUNK)
        for (long at = begin; at < begin + CHUNK && at < bytes; at += PAGE) memory[at] = 0;
    close_region();
}
#else
static int open_region(void) { return 0; }
static void close_region(void) {}
static int run_together(mk_work *work, int threads) { return (void)work, (void)threads, 0; }
void mk_first_touch(uint8_t *memory, long bytes, int threads) { (void)memory; (void)bytes; (void)threads; }
#endif

static void run_alone(mk_work *work) {
    for (mk_step *step = work->steps; step < work->steps + work->count; step++)
        if (step->items > 0) step->range(&step->job, 0, step->items);
}

/* Divide the steps into parts; returns the largest number of parts of a set. */
static long prepare(mk_work *work, int threads) {
    long maximum = 0;
    atomic_store(&work->now, -1);
    for (mk_step *step = work->steps, *set = step; step < work->steps + work->count; step++) {
        long parts = step->uneven ? step->items : PARTS * (long)threads;
        while (parts > threads && step->items < parts * step->minimum) parts -= threads;
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
        if (set->all > maximum) maximum = set->all;
    }
    return maximum;
}

int mk_run(mk_work *work, int threads) {
    int failed = work->failed;
    atomic_fetch_add(&regions, 1);
    atomic_fetch_add(&weights_read, work->weights);
    if (!failed) {
        if (prepare(work, threads) > 1 && threads > 1 && open_region()) {
            failed = run_together(work, threads);
            close_region();
        } else {
            run_alone(work);
        }
    }
    for (mk_query_groups *groups = work->groups, *next; groups; groups = next) {
        next = groups->next;
        free(groups);
    }
    mk_begin(work);
    return failed;
}
