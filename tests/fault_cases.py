"""What clients, machines and models do to a server, case by case: what is expected, and the tests that hold it.

A case or a part of one that is not tested yet says why in `waits`. tests/test_fault_cases.py checks that nothing is
missing and that every test exists.
"""

from typing import NamedTuple


class Case(NamedTuple):
    expected: str
    tests: tuple[str, ...] = ()
    """file::function, below tests/."""
    waits: str = ""


BAD, EDGES, WS, CHAT, TEXT, ANSWER = (
    f"api/test_{name}.py::" for name in ("bad_input", "edges", "ws", "chat", "completions", "answer")
)
SERVE, FLEET, STALLS = "test_serve.py::", "fleet/test_fleet.py::", "test_stalls.py::"
PROMPTS, SOCKETS, LOAD, WORKERS, START, WORDS = (
    f"faults/test_{name}.py::" for name in ("prompts", "sockets", "load", "workers", "start", "words")
)
FIELDS = (
    BAD + "test_a_bad_field_of_a_chat_request_is_named", BAD + "test_a_bad_field_of_a_completion_request_is_named",
)  # fmt: skip
GRAMMARS, STRUCTURED, TRIALS = "api/test_grammars.py::", "test_structured.py::", "grammar/test_trials.py::"
IN_TIME = GRAMMARS + "test_what_takes_too_long_is_refused_for_good_and_holds_nobody_up"
IMAGES = "models with eyes are not served yet: a message with a picture is refused by name"

CASES = {
    # Parameters
    "F15": Case("temperature that is no number from 0 to 2: 400 by name; null is the default", (
        *FIELDS, BAD + "test_what_is_not_json_is_refused", BAD + "test_numbers_beyond_every_type_are_refused_by_name",
        BAD + "test_values_at_the_edge_are_taken",
    )),
    "F16": Case("top_p, top_k, min_p and penalties out of range or of another type: 400 by name", FIELDS),
    "F17": Case("a top_k above the vocabulary is off", (
        "api/test_convert.py::test_a_top_k_that_cuts_nothing_is_off", BAD + "test_values_at_the_edge_are_taken",
    )),
    "F18": Case("max_tokens that is no count: 400; 0 only where the prompt is scored", (
        *FIELDS, TEXT + "test_a_prompt_may_be_scored_without_generating",
        BAD + "test_what_exceeds_the_context_is_refused_in_the_words_that_clients_look_for",
    )),
    "F19": Case("a prompt as long as the context is refused, one token less gets one token", (
        BAD + "test_what_exceeds_the_context_is_refused_in_the_words_that_clients_look_for",
        BAD + "test_a_prompt_one_short_of_the_context_gets_one_token",
    )),
    "F20": Case("n or best_of out of range: 400; choices that do not fit together run one after the other", (
        *FIELDS, BAD + "test_too_many_choices_over_all_prompts_are_refused",
        LOAD + "test_choices_that_fit_the_cache_one_after_the_other_are_all_served",
    )),
    "F21": Case("top_logprobs out of range, or without logprobs: 400", (
        *FIELDS, BAD + "test_fields_that_contradict_each_other_are_refused",
    )),
    "F22": Case("logit_bias that is huge, of ids that are none, of numbers out of range: 400", (
        *FIELDS, PROMPTS + "test_a_field_of_a_megabyte_is_refused_by_name",
    )),
    "F23": Case("prompt logprobs out of range: 400; those of a long prompt are computed in slices", (
        *FIELDS, PROMPTS + "test_scores_of_whole_prompts_take_no_more_memory_each_time",
        "workers/test_runner.py::test_prompt_logprobs_are_those_of_log_softmax_in_slices",
    )),
    "F24": Case("prompt ids that are negative, unknown, no integers, nested: 400 by name", (
        FIELDS[1], BAD + "test_the_last_of_several_prompts_spoils_all_of_them",
        "api/test_convert.py::test_ids_up_to_the_vocabulary_make_a_prompt",
    )),
    "F25": Case("no prompt, no message, no content: 400; empty content where the template makes tokens of it", (
        *FIELDS, BAD + "test_control_tokens_and_odd_messages_never_break_the_server",
    )),
    "F26": Case("messages of unknown roles or shapes: 400 with their index, or the template's own words", (
        FIELDS[0], BAD + "test_a_message_at_fault_is_named_by_its_index",
        BAD + "test_control_tokens_and_odd_messages_never_break_the_server",
        PROMPTS + "test_what_a_template_refuses_is_answered_in_its_words",
    )),
    "F27": Case("stops that are empty, many, long, no strings: 400; one that comes first leaves nothing", (
        *FIELDS, PROMPTS + "test_a_field_of_a_megabyte_is_refused_by_name", CHAT + "test_stop_strings_cut_the_text",
        "text/test_stop.py::test_stop_equal_to_the_first_token_gives_empty_text",
    )),
    "F28": Case("control tokens as ids, or typed by a user: they are continued, or on demand taken for text", (
        PROMPTS + "test_prompts_of_nothing_but_control_tokens_are_continued",
        BAD + "test_control_tokens_and_odd_messages_never_break_the_server",
        "text/test_tokenizer.py::test_special_tokens_in_text_become_control_tokens_and_are_skipped_on_demand",
        PROMPTS + "test_a_server_may_take_typed_control_tokens_for_text",
        "api/test_tokenize.py::test_special_tokens_that_users_type_are_text_on_demand",
        "text/test_typed.py::test_typed_special_tokens_are_cut_as_the_library_cuts_text",
    )),
    "F29": Case("stream and stream_options of other types, or one without the other: 400", (
        *FIELDS, BAD + "test_fields_that_contradict_each_other_are_refused",
    )),
    "F30": Case("unknown fields are ignored, ten thousand of them too", (BAD + "test_unknown_fields_are_ignored",)),
    # Structured output, tools, templates
    "F31": Case("schemas that are none, refer to themselves or elsewhere, nest deeply: 400, no network", FIELDS),
    "F32": Case("expressions that explode: 400 in time, and the loop goes on", (
        *FIELDS, IN_TIME, TRIALS + "test_what_takes_too_long_is_ended",
        TRIALS + "test_what_takes_too_much_memory_is_ended",
        TRIALS + "test_what_a_grammar_does_to_its_trial_is_told_and_the_next_one_goes_on",
        "workers/test_loop.py::test_a_grammar_that_is_never_built_costs_its_row_and_nothing_hangs",
        "workers/test_constraints.py::test_a_grammar_that_takes_long_holds_back_no_other",
    )),
    "F33": Case("grammars that are broken, empty, huge: 400", (
        *FIELDS, GRAMMARS + "test_a_grammar_may_have_so_many_bytes",
    )),
    "F34": Case("enums and properties by the thousand: served, or refused in time", (*FIELDS, IN_TIME)),
    "F35": Case("ten thousand schemas: the cache stays within its bytes", (
        GRAMMARS + "test_verdicts_are_kept_up_to_a_number_of_bytes",
        "workers/test_constraints.py::test_a_grammar_is_built_once_and_the_oldest_ones_are_given_up",
    )),
    "F36": Case("tools that are none, huge, unnamed, twice there; a choice of none of them; null parameters are none", (
        FIELDS[0], "api/test_tools.py::test_calls_that_cannot_be_demanded_are_refused",
        "api/test_tools.py::test_parameters_that_nobody_enforces_are_left_to_the_model",
    ), "a schema that no grammar enforces is text for the model: tools with types such as any and patterns of other "
        "dialects are about, and models call them; only what is demanded or strict is tried out"),
    "F37": Case("a grammar that ends early, or never: stop, or length with a valid beginning", (
        STRUCTURED + "test_an_answer_stops_when_its_grammar_ends_though_min_tokens_asks_for_more",
        STRUCTURED + "test_an_answer_that_reaches_max_tokens_is_cut",
    )),
    "F38": Case("stops within constrained text end it as they end any other", (
        STRUCTURED + "test_a_stop_string_ends_constrained_text_as_it_does_any_other",
    )),
    "F39": Case("a request brings no template, and no variable under a taken name: 400 not_allowed", (
        FIELDS[0], BAD + "test_what_only_the_server_may_set_is_not_allowed",
        "text/test_chat.py::test_request_variables_under_taken_names_are_refused_by_name",
        "text/test_chat.py::test_options_of_apply_chat_template_are_no_variables",
    )),
    "F40": Case("template variables that are huge, many or deep: 400 by name", (
        FIELDS[0], PROMPTS + "test_a_field_of_a_megabyte_is_refused_by_name",
        "text/test_chat.py::test_request_variables_must_be_scalars",
    )),
    "F41": Case("calls of tools that are no JSON, without end, too many: text, a limit, a cut", (
        "text/test_parsers.py::test_an_output_says_what_it_says",
        "api/test_tools.py::test_a_call_that_the_length_cuts_off_ends_with_length",
        "api/test_tools.py::test_one_call_is_all_where_calls_are_not_parallel",
    ), "white space without end is limited only where a grammar draws the arguments"),
    # Media
    "F42": Case("files that are no picture, or of another kind: 400", waits=IMAGES),
    "F43": Case("pictures of hundreds of megapixels: 400 before they are decoded", waits=IMAGES),
    "F44": Case("pictures of odd sizes and colours: resized, or 400", waits=IMAGES),
    "F45": Case("a thousand pictures: 400", waits=IMAGES),
    "F46": Case("pictures from elsewhere: never fetched", (WORDS + "test_no_address_in_a_message_is_opened",), IMAGES),
    # Streams and clients that leave
    "F47": Case("a client that leaves, whenever: its row is retired at the next boundary, and it is counted", (
        ANSWER + "test_a_client_that_leaves_ends_its_request", ANSWER + "test_two_hundred_clients_may_leave_at_once",
        ANSWER + "test_a_client_that_leaves_in_the_middle_of_its_body_is_nothing",
        "faults/test_leaving.py::test_a_client_that_has_left_already_leaves_no_traceback",
        SERVE + "test_clients_that_go_away_leave_nothing_behind",
        "api/test_metrics.py::test_gauges_show_what_runs_now_and_a_client_that_left_is_counted",
    )),
    "F48": Case("a client that closes its half counts as gone", (
        EDGES + "test_a_client_that_closes_its_half_counts_as_gone",
        ANSWER + "test_a_half_closed_connection_counts_as_gone",
    )),
    "F49": Case("a client that stops reading holds one buffer, delays nobody, and is cut off in the end", (
        ANSWER + "test_a_client_that_reads_nothing_is_cut_off",
        WS + "test_a_client_that_does_not_read_is_closed_and_delays_nobody",
        "api/test_stream.py::test_what_comes_while_a_client_does_not_read_shares_an_event_once_it_does",
    )),
    "F50": Case("a client without a stream leaves while it waits or runs: nothing is computed for it any more", (
        ANSWER + "test_a_client_that_leaves_the_queue_is_forgotten",
        ANSWER + "test_a_client_that_leaves_ends_its_request",
    )),
    "F51": Case("one of several choices ends early: its end comes once, the others go on", (
        CHAT + "test_n_choices_open_in_order_and_end_once_each",
    )),
    "F52": Case("a long wait in the queue: comments keep the connection alive", (
        ANSWER + "test_silence_is_broken_by_comments_before_the_first_token_and_between_tokens",
    )),
    "F53": Case("stops over several tokens or bytes, or at the last token: no part leaks, stop wins", (
        CHAT + "test_no_part_of_a_stop_string_is_ever_streamed",
        CHAT + "test_a_stop_at_the_last_token_wins_over_the_length",
        "api/test_choice.py::test_random_texts_stops_and_cuts_agree_with_a_plain_search",
    )),
    "F54": Case("characters cut by prompts and ends: whole where they can be, nothing of the prompt leaks", (
        CHAT + "test_a_character_of_several_tokens_is_never_cut",
        CHAT + "test_text_that_ends_within_a_character_shows_it_as_broken",
        "text/test_detokenizer.py::test_prompt_text_never_leaks_and_its_open_character_is_completed",
    )),
    "F55": Case("thousands of slow streams: little memory for each, and the loop stays on time", (
        "test_soak.py::test_a_short_soak_is_flat",
    ), "a test has 40 of them; `make soak` has 2,000, with all their memory and the loop's lag, in its table"),
    # WebSocket
    "F56": Case("frames that are too long, compressed, empty, broken, without end; floods: closed with its code", (
        SOCKETS + "test_what_breaks_the_protocol_ends_the_socket_with_its_code",
        SOCKETS + "test_pieces_and_pings_between_them_make_one_message",
        SOCKETS + "test_a_flood_of_pings_is_answered_and_delays_nobody", WS + "test_close_codes",
        WS + "test_a_frame_that_says_to_be_too_long_is_not_waited_for",
    ), "a frame without mask is read all the same, as aiohttp does: masks protect proxies, not servers"),
    "F57": Case("sockets that say nothing: pings find out who is gone", (
        WS + "test_a_client_that_answers_no_ping_is_given_up",
        SOCKETS + "test_two_hundred_sockets_may_open_and_be_cut_off_at_once",
        EDGES + "test_a_thousand_idle_connections_are_nobodys_burden",
    ), "there is no limit for one address: behind a proxy all clients have one"),
    "F58": Case("frames that are no request, or a second one under an id that runs: an error, the socket lives", (
        WS + "test_what_is_no_frame_is_answered_and_the_socket_lives",
        WS + "test_an_id_in_use_is_refused_without_ending_its_owner",
        WS + "test_one_conversation_too_many_is_refused_and_the_others_go_on",
    )),
    "F59": Case("a socket that closes aborts what it asked for; foreign pages get 403 before the upgrade", (
        WS + "test_the_end_of_a_socket_aborts_all_of_it", WS + "test_other_sites_are_refused_before_the_upgrade",
    )),
    # Load and faults
    "F60": Case("ten times what may wait: refused at once with a time to come back, the others are served", (
        LOAD + "test_ten_times_what_may_wait_is_turned_away_and_who_waits_is_served",
        LOAD + "test_a_full_queue_says_so_at_once",
        ANSWER + "test_a_full_queue_answers_503_before_a_request_is_any_work",
    )),
    "F61": Case("a burst of long prompts: admitted as the cache allows, and streams go on between chunks", (
        LOAD + "test_a_burst_of_long_prompts_is_served_beside_a_stream",
        STALLS + "test_what_is_huge_delays_nobody_else",
        "engine/test_scheduler.py::test_chunks_keep_to_the_budget_and_to_the_size_of_one_row",
    )),
    "F62": Case("outputs that overflow the cache: the youngest pauses and goes on with the same tokens", (
        LOAD + "test_outputs_that_overflow_the_cache_are_paused_and_lose_no_token",
        "api/test_convert.py::test_a_pool_smaller_than_the_context_is_the_limit",
        "engine/test_scheduler.py::test_rows_that_do_not_fit_later_are_paused_and_come_back",
        "test_crowd.py::test_a_crowd_gets_what_it_asked_for_and_its_record_can_be_replayed",
    )),
    "F63": Case("memory that lacks for a step: its requests get an error, the worker and the others live", (
        WORKERS + "test_memory_that_lacks_for_a_prompt_costs_that_request_only",
        "workers/test_loop.py::test_a_step_that_cannot_be_built_costs_its_rows_and_loses_no_upload",
        "workers/test_gpu.py::test_an_error_of_a_launch_is_its_own_and_memory_that_lacks_names_the_flags",
    )),
    "F64": Case("a worker that is killed, crashes or stands still: noticed, named, restarted, no token lost", (
        SERVE + "test_a_killed_worker_costs_no_token",
        WORKERS + "test_a_worker_that_crashes_costs_no_token_and_the_log_names_the_signal",
        WORKERS + "test_a_worker_that_stands_still_for_a_while_loses_nothing",
        FLEET + "test_a_worker_that_stands_still_for_good_is_replaced_and_no_token_is_lost",
        "fleet/test_standstill.py::test_the_same_count_at_every_look_is_a_standstill",
        "test_notify.py::test_signs_of_life_end_when_the_worker_stands_still",
        "workers/test_gpu.py::test_a_lost_device_is_told_from_a_failed_step",
        "fleet/test_ranks.py::test_two_ranks_say_what_one_says_and_share_their_fate",
    )),
    "F65": Case("a server that is killed takes its workers along and leaves no memory with a name", (
        SERVE + "test_a_server_that_is_killed_takes_its_workers_along",
        START + "test_two_ranks_listen_nowhere_but_at_the_servers_port_and_use_no_named_memory",
    )),
    "F66": Case("SIGTERM and SIGINT, idle, busy, loading, twice: requests end, or all stops at once", (
        SERVE + "test_sigterm_drains", SERVE + "test_a_second_sigterm_stops_at_once",
        SERVE + "test_sigterm_while_loading_stops_soon",
        WORKERS + "test_ctrl_c_ends_a_server_and_its_workers_in_order",
        FLEET + "test_signals_to_the_whole_group_leave_workers_to_the_server",
        "test_operation.py::test_keys_are_read_again_while_streams_go_on",
        "test_operation.py::test_a_server_ends_with_its_terminal_but_not_under_nohup",
    )),
    "F67": Case("full disks, no home, no temporary folder: the server runs, and says what it lost", (
        START + "test_a_log_that_cannot_be_written_costs_lines_and_nothing_else",
        START + "test_a_machine_without_home_and_temporary_folder_is_served",
        "fleet/test_record.py::test_a_full_disk_ends_the_record_and_nothing_else",
        "fleet/test_trace.py::test_the_file_is_whole_after_every_event_and_when_the_disk_is_full",
        "hub/test_cache.py::test_a_full_disk_names_the_variable",
        "hub/test_cache.py::test_a_cache_that_cannot_be_written_names_the_variable",
    )),
    "F68": Case("a small /dev/shm does not matter: nothing lies there", (
        START + "test_two_ranks_listen_nowhere_but_at_the_servers_port_and_use_no_named_memory",
    )),
    "F69": Case("ports that are taken, other addresses, names: served, or refused before weights are loaded", (
        START + "test_a_start_that_fails_does_so_soon", START + "test_other_addresses_of_this_machine_are_listened_at",
        START + "test_an_address_that_is_not_there_is_refused_before_the_model_is_looked_for",
        SERVE + "test_a_start_that_fails_says_why_in_its_last_line",
    )),
    "F70": Case("models that are missing, cut, broken, unknown: exit status 1, one line of reason", (
        START + "test_a_model_that_cannot_be_served_is_refused_in_one_line",
        SERVE + "test_a_start_that_fails_says_why_in_its_last_line",
        "hub/test_resolve.py::test_nonsense_is_answered_with_the_accepted_forms",
        "workers/test_checkpoint.py::test_a_damaged_file_is_refused_with_its_name",
    )),
    "F71": Case("a GPU that is full, missing or too old: one line with numbers", (
        "test_serve_gpu.py::test_a_cache_that_does_not_fit_is_refused_with_the_size_that_would",
        "workers/test_gpu.py::test_what_cannot_serve_is_refused_in_one_line",
        "test_doctor.py::test_a_device_that_is_missing_fails",
    ), "parts of a GPU (MIG) and memory that others take meanwhile need such machines"),
    "F72": Case("logits that are not finite: an error for that request, the others go on", (
        ANSWER + "test_an_error_after_200_is_an_event_and_then_the_end",
        ANSWER + "test_an_error_before_200_is_a_500_not_to_be_repeated",
        "api/test_metrics.py::test_a_model_that_fails_at_arithmetic_is_counted",
        "workers/test_runner.py::test_logits_that_are_not_finite_are_reported_and_harm_no_other_row",
        "workers/test_loop.py::test_a_token_that_is_not_finite_idles_its_row",
    )),
    "F73": Case("a row that may draw nothing: an end, never token 0", (
        "kernels/test_sample.py::test_a_row_without_a_possible_token_gives_minus_one",
        "workers/test_rows.py::test_a_row_stops_at_each_of_its_stop_ids_and_where_nothing_could_be_drawn",
        "workers/test_constraints.py::test_a_matcher_that_fails_costs_its_own_row",
    )),
    "F74": Case("clocks that jump change nothing", ("faults/test_clock.py::test_nothing_waits_by_the_time_of_day",)),
    "F75": Case("a long time with faults among the requests: memory, descriptors, threads, slots stay flat", (
        "test_soak.py::test_a_short_soak_is_flat",
    ), "a day: `make soak` puts half an hour's faults into minutes"),
    "F76": Case("a helper of grammars that dies is replaced, and its request fails once", (
        TRIALS + "test_the_process_begins_again_where_it_has_ended",
        TRIALS + "test_what_a_grammar_does_to_its_trial_is_told_and_the_next_one_goes_on",
        GRAMMARS + "test_what_could_not_be_tried_out_is_tried_again",
    )),
    "F77": Case("a megabyte of one letter, spaces, emoji: refused as too long in linear time", (
        PROMPTS + "test_a_megabyte_of_odd_text_is_too_long_and_delays_no_probe",
        PROMPTS + "test_a_tokenizer_that_splits_nothing_is_not_quadratic",
        STALLS + "test_what_is_huge_delays_nobody_else",
    )),
    "F78": Case("one request id twice at a time: both are served", (
        "api/test_app.py::test_the_same_request_id_may_be_used_twice_at_once",
    )),
    "F79": Case("streams are never compressed", ("api/test_app.py::test_streams_are_never_compressed",)),
    "F80": Case("figures asked for a hundred times a second, under load", (
        LOAD + "test_figures_may_be_asked_for_a_hundred_times_a_second",
    ), "they are made anew each time, which takes 4 ms of a slow core: none of them is a second old"),
    # Security
    "S1": Case("nothing unpickles, and nothing runs text", ("test_layout.py::test_nothing_unpickles_or_runs_text",)),
    "S2": Case("nothing listens but the one port, on the loopback address unless asked", (
        START + "test_two_ranks_listen_nowhere_but_at_the_servers_port_and_use_no_named_memory",
        FLEET + "test_workers_listen_nowhere", SERVE + "test_a_server_open_to_others_without_keys_says_so",
    )),
    "S3": Case("no address in a message is opened", (WORDS + "test_no_address_in_a_message_is_opened",)),
    "S4": Case("no file is read for a message", (WORDS + "test_no_address_in_a_message_is_opened",), IMAGES),
    "S5": Case("templates reach nothing of Python, and end in time and memory", (
        "text/test_chat.py::test_sandbox_blocks_python_internals_mutation_and_huge_ranges",
        "text/test_sandbox.py::test_what_would_make_gigabytes_is_refused_before_it_begins",
        CHAT + "test_a_template_without_an_end_costs_its_own_request_only",
    )),
    "S6": Case("errors tell nothing of memory, folders or code", (
        WORDS + "test_no_refusal_tells_of_the_inside", WORDS + "test_what_a_template_raises_does_not_show_the_server",
    )),
    "S7": Case("no code of a model runs; headers are bounded; pickles are refused", (
        START + "test_code_that_came_with_a_model_is_not_run",
        START + "test_a_model_that_cannot_be_served_is_refused_in_one_line",
        "workers/test_checkpoint.py::test_a_damaged_file_is_refused_with_its_name",
        "hub/test_resolve.py::test_a_pickled_checkpoint_is_refused_with_a_command_that_converts_it",
        "hub/test_resolve.py::test_a_hub_id_becomes_a_snapshot_without_code_or_pickles",
    )),
    "S8": Case("keys are compared as digests in constant time, and never logged", (
        "api/test_keys.py::test_every_key_is_compared_whole_whichever_is_the_right_one",
        "api/test_keys.py::test_no_key_a_wrong_one_and_two_at_once_are_refused",
        "api/test_keys.py::test_a_key_of_two_megabytes_is_not_even_read",
        SERVE + "test_a_server_with_keys_serves_who_shows_one_and_its_log_shows_none",
    )),
    "S9": Case("what one client cached is nobody else's to find out, nor to drive out", (
        "engine/test_ledger.py::test_namespaces_do_not_share",
        "api/test_quota.py::test_no_key_sees_what_another_one_has_in_the_cache",
        "api/test_quota.py::test_a_key_that_floods_the_cache_leaves_the_others_theirs",
        "engine/test_share.py::test_a_flood_takes_of_the_others_no_more_than_one_entry_beyond_its_share",
        "engine/test_radix.py::test_random_use_agrees_with_a_table_of_prefixes",
    )),
    "S10": Case("foreign pages and foreign names of this machine open no socket", (
        WS + "test_other_sites_are_refused_before_the_upgrade",
        "api/test_origin.py::test_other_pages_and_names_are_refused",
    )),
    "S11": Case("nothing for operators is behind the public port", (
        "api/test_admin.py::test_the_public_listener_has_none_of_these_routes",
        WORDS + "test_nothing_for_operators_and_no_file_is_behind_the_public_port",
    )),
    "S12": Case("no path leads to a file outside", (
        WORDS + "test_nothing_for_operators_and_no_file_is_behind_the_public_port",
        "api/test_static.py::test_no_path_reaches_another_file",
        "workers/test_checkpoint.py::test_an_index_that_leads_out_of_the_folder_is_refused",
    ), "adapters and profiles, whose names could lead elsewhere, are not served yet"),
}  # fmt: skip
