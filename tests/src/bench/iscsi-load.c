// Load for an iSCSI LUN by libiscsi: SESSIONS sessions, each with DEPTH commands in flight, for SECONDS.
//
//   iscsi-load URL read|write random|sequential BLOCK DEPTH SESSIONS SECONDS BYTES SEED
//
// One thread, nothing is cached: each command goes to the target. Every 4096 bytes begin with their own place on the LUN, written
// by each write and compared after each read, so that an answer that is not the data is an error. Exit 1 on any error.
// Prints "commands seconds least most": of all sessions, and the commands of the slowest and of the fastest session.
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>

#define STAMPED 4096
#define TIMEOUT_MS 60000

struct session;

struct slot {
	struct session *session;
	struct scsi_iovec memory;
	uint64_t offset;
};

struct session {
	struct iscsi_context *context;
	struct slot *slots;
	uint64_t next, done, random;
	int busy;
};

static int writes, is_random, depth, lun, logical;
static uint64_t block, bytes;
static double end;

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void die(const char *what, const char *why)
{
	fprintf(stderr, "iscsi-load: %s: %s\n", what, why);
	exit(1);
}

static void submit(struct slot *slot);

static void completed(struct iscsi_context *context, int status, void *data, void *private)
{
	struct slot *slot = private;
	struct scsi_task *task = data;
	if (status != SCSI_STATUS_GOOD)
		die("a command failed", iscsi_get_error(context));
	if (task->residual_status != SCSI_RESIDUAL_NO_RESIDUAL)
		die("a command failed", "data are missing");
	for (uint64_t at = 0; !writes && at < block; at += STAMPED) {
		uint64_t stamp;
		memcpy(&stamp, (char *)slot->memory.iov_base + at, sizeof stamp);
		if (stamp != slot->offset + at)
			die("a read failed", "these are not the data of their place");
	}
	scsi_free_scsi_task(task);
	slot->session->done++;
	slot->session->busy--;
	if (now() < end)
		submit(slot);
}

static void submit(struct slot *slot)
{
	struct session *session = slot->session;
	uint64_t blocks = bytes / block, nth;
	if (is_random) {
		session->random ^= session->random << 13;
		session->random ^= session->random >> 7;
		session->random ^= session->random << 17;
		nth = session->random % blocks;
	} else {
		nth = session->next++ % blocks;
	}
	slot->offset = nth * block;
	struct scsi_task *task;
	if (writes) {
		for (uint64_t at = 0; at < block; at += STAMPED) {
			uint64_t stamp = slot->offset + at;
			memcpy((char *)slot->memory.iov_base + at, &stamp, sizeof stamp);
		}
		task = iscsi_write16_iov_task(session->context, lun, slot->offset / logical, NULL, block, logical, 0, 0, 0, 0, 0,
					      completed, slot, &slot->memory, 1);
	} else {
		// What was there before must not pass for what is read.
		for (uint64_t at = 0; at < block; at += STAMPED)
			memset((char *)slot->memory.iov_base + at, 0xff, sizeof(uint64_t));
		task = iscsi_read16_iov_task(session->context, lun, slot->offset / logical, block, logical, 0, 0, 0, 0, 0,
					     completed, slot, &slot->memory, 1);
	}
	if (task == NULL)
		die("a command cannot be sent", iscsi_get_error(session->context));
	session->busy++;
}

static void log_in(struct session *session, const char *text, int nth, uint64_t seed)
{
	char name[64];
	snprintf(name, sizeof name, "iqn.2026-01.test:load%d", nth);
	session->context = iscsi_create_context(name);
	struct iscsi_url *url = iscsi_parse_full_url(session->context, text);
	if (url == NULL)
		die(text, iscsi_get_error(session->context));
	lun = url->lun;
	iscsi_set_targetname(session->context, url->target);
	iscsi_set_session_type(session->context, ISCSI_SESSION_NORMAL);
	iscsi_set_header_digest(session->context, ISCSI_HEADER_DIGEST_NONE);
	iscsi_set_noautoreconnect(session->context, 1);
	if (iscsi_full_connect_sync(session->context, url->portal, lun) != 0)
		die(url->portal, iscsi_get_error(session->context));
	struct scsi_task *task = iscsi_readcapacity16_sync(session->context, lun);
	struct scsi_readcapacity16 *capacity = task ? scsi_datain_unmarshall(task) : NULL;
	if (capacity == NULL || task->status != SCSI_STATUS_GOOD)
		die("the capacity", iscsi_get_error(session->context));
	logical = capacity->block_length;
	if (bytes > (capacity->returned_lba + 1) * logical)
		die(text, "the LUN is smaller than BYTES");
	scsi_free_scsi_task(task);
	session->random = (seed + nth) * 0x9e3779b97f4a7c15u | 1;
	// Sequential sessions start at places of their own.
	session->next = bytes / block * nth / 64;
	session->slots = calloc(depth, sizeof *session->slots);
	for (int i = 0; i < depth; i++) {
		session->slots[i].session = session;
		session->slots[i].memory.iov_len = block;
		if (posix_memalign(&session->slots[i].memory.iov_base, 4096, block) != 0)
			die("memory", "there is none");
		memset(session->slots[i].memory.iov_base, 0x5a, block);
	}
	iscsi_destroy_url(url);
}

int main(int count, char **words)
{
	if (count != 10)
		die("usage", "iscsi-load URL read|write random|sequential BLOCK DEPTH SESSIONS SECONDS BYTES SEED");
	writes = strcmp(words[2], "write") == 0;
	is_random = strcmp(words[3], "random") == 0;
	block = strtoull(words[4], NULL, 0);
	depth = atoi(words[5]);
	int sessions = atoi(words[6]);
	double seconds = atof(words[7]);
	bytes = strtoull(words[8], NULL, 0);
	uint64_t seed = strtoull(words[9], NULL, 0);
	if (block == 0 || block % STAMPED != 0 || depth < 1 || sessions < 1 || bytes < block)
		die("usage", "BLOCK is a multiple of 4096, BYTES at least as large, DEPTH and SESSIONS at least 1");
	struct session *all = calloc(sessions, sizeof *all);
	struct pollfd *polled = calloc(sessions, sizeof *polled);
	for (int i = 0; i < sessions; i++)
		log_in(&all[i], words[1], i, seed);
	double start = now();
	end = start + seconds;
	for (int i = 0; i < sessions; i++)
		for (int s = 0; s < depth; s++)
			submit(&all[i].slots[s]);
	for (;;) {
		int busy = 0;
		for (int i = 0; i < sessions; i++) {
			busy += all[i].busy;
			polled[i].fd = iscsi_get_fd(all[i].context);
			polled[i].events = iscsi_which_events(all[i].context);
		}
		if (busy == 0)
			break;
		int ready = poll(polled, sessions, TIMEOUT_MS);
		if (ready <= 0)
			die("poll", ready == 0 ? "no answer within a minute" : "it failed");
		for (int i = 0; i < sessions; i++)
			if (polled[i].revents != 0 && iscsi_service(all[i].context, polled[i].revents) < 0)
				die("the connection", iscsi_get_error(all[i].context));
	}
	double elapsed = now() - start;
	uint64_t sum = 0, least = UINT64_MAX, most = 0;
	for (int i = 0; i < sessions; i++) {
		sum += all[i].done;
		least = all[i].done < least ? all[i].done : least;
		most = all[i].done > most ? all[i].done : most;
		iscsi_logout_sync(all[i].context);
		iscsi_destroy_context(all[i].context);
	}
	printf("%" PRIu64 " %.6f %" PRIu64 " %" PRIu64 "\n", sum, elapsed, least, most);
	return 0;
}
