-- Settlement: finishes records, releases holds, charges, and corrects the token counters. Idempotent by
-- request id.
--
--   due = ceil(billable x the record's markup)
--   cost = min(due, own hold + unheld credits)
--   overrun = due - cost

create type public.settlement_item as (
    request_id uuid,
    status text,
    source text,
    billable_nanos numeric,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    model_used text,
    provider text,
    finish_reason text,
    error_code text,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id text,
    stored_answer text,
    cache jsonb
);
comment on type public.settlement_item is
    'stored_answer: the sealed answer, for the idempotency key and the cache. cache: {place, fingerprint, '
    'ttl_seconds} where it is to be cached.';
revoke all on type public.settlement_item from public, anon, authenticated;
grant usage on type public.settlement_item to service_role;

-- Settling requests
-- -----------------

-- The users whose requests these items name. Runs before anything is known to be well-formed.
create function public.settlement_users(p_items jsonb) returns bigint[] language sql stable as $$
    select array_agg((
        select r.user_id from public.usage_records r
        where r.request_id = case when i ->> 'request_id' ~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                  then (i ->> 'request_id')::uuid end limit 1))
    from jsonb_array_elements(p_items) as i
$$;
revoke all on function public.settlement_users(jsonb) from public, anon, authenticated;
grant execute on function public.settlement_users(jsonb) to service_role;

create function public.settle_requests(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.settle_one(
                jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then -- one bad item must not keep its neighbours from being settled
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        v_answers := v_answers || (v_answer || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    return to_jsonb(v_answers);
end $$;
comment on function public.settle_requests is
    'Finishes each item (settlement_item). Answers carry request_id and outcome: settled, repeated (the '
    'first settlement stands), unknown, busy or failed.';
revoke all on function public.settle_requests(jsonb) from public, anon, authenticated;
grant execute on function public.settle_requests(jsonb) to service_role;

-- Under the user's own upstream key nothing is due; what the upstream reports is recorded for them.
create function public.settle_one(p_item public.settlement_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_record public.usage_records;
    v_held bigint := 0;
    v_upstream bigint := ceil(p_item.billable_nanos);
    v_due bigint;
    v_cost bigint;
    v_unheld bigint;
    v_before bigint;
    v_balance bigint;
    v_deleted_at timestamptz;
begin
    select * into v_record from public.usage_records where request_id = p_item.request_id;
    if not found then
        return jsonb_build_object('outcome', 'unknown');
    elsif v_record.user_id <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    -- A settlement without a known cost is amended once, by one that knows it.
    elsif v_record.status <> 'pending'
          and (v_record.settlement_source <> 'none' or p_item.source = 'none') then
        return public.settlement_answer(p_item.request_id, 'repeated');
    end if;
    if v_record.status = 'pending' then
        v_held := v_record.hold_nanos;
        v_before := v_record.prompt_estimate;
    else
        v_before := public.counted_tokens(
            v_record.prompt_tokens, v_record.completion_tokens, v_record.prompt_estimate);
    end if;
    -- A test key's answer is invented: nobody pays for it.
    if v_record.environment = 'test' then
        v_upstream := 0;
        v_due := 0;
    elsif v_record.byok then
        v_due := 0;
    else
        v_due := ceil(p_item.billable_nanos * v_record.markup);
    end if;
    -- Unheld credits of a live database are real money: a request of play money costs no more than what was
    -- held for it.
    select case when v_record.mode = s.mode then u.credits_nanos - u.held_nanos else 0 end into v_unheld
    from public.users u, public.gateway_state s where u.id = v_record.user_id;
    -- Credits that other requests hold are not touched. What is due beyond the rest is the overrun.
    v_cost := least(v_due, v_record.cost_nanos + v_held + v_unheld);
    update public.users set credits_nanos = credits_nanos - (v_cost - v_record.cost_nanos),
        held_nanos = held_nanos - v_held
    where id = v_record.user_id returning credits_nanos, deleted_at into v_balance, v_deleted_at;
    perform public.release_counters(
        v_record,
        public.counted_tokens(p_item.prompt_tokens, p_item.completion_tokens, v_record.prompt_estimate)
        - v_before,
        v_cost - v_record.cost_nanos, v_now);
    if v_record.mode = 'sandbox' then
        perform public.expire_play_rest(v_record, v_cost);
    end if;
    if v_record.mode = 'sandbox' or v_deleted_at is not null then
        -- More may have left the account just now, by expire_play_rest or the trigger of deleted accounts.
        select credits_nanos into v_balance from public.users where id = v_record.user_id;
    end if;
    update public.usage_records set
        status = p_item.status, settlement_source = p_item.source, settled_at = v_now,
        upstream_cost_nanos = v_upstream, cost_nanos = v_cost, overrun_nanos = v_due - v_cost,
        balance_after_nanos = v_balance, prompt_tokens = p_item.prompt_tokens,
        completion_tokens = p_item.completion_tokens, cached_tokens = p_item.cached_tokens,
        reasoning_tokens = p_item.reasoning_tokens, model_used = coalesce(p_item.model_used, model_used),
        provider = coalesce(p_item.provider, provider),
        finish_reason = coalesce(p_item.finish_reason, finish_reason),
        error_code = coalesce(p_item.error_code, error_code),
        latency_ms = coalesce(latency_ms, p_item.latency_ms),
        time_to_first_token_ms = coalesce(time_to_first_token_ms, p_item.time_to_first_token_ms),
        generation_id = coalesce(left(p_item.generation_id, 256), generation_id)
    where request_id = p_item.request_id;
    if v_record.has_idempotency_key and v_record.status = 'pending' then
        perform public.finish_idempotency(
            v_record.request_id, p_item.stored_answer, v_cost > 0 or (v_record.byok and v_upstream > 0));
    end if;
    if p_item.cache is not null and p_item.stored_answer is not null and p_item.status = 'completed' then
        perform public.keep_in_cache(p_item.cache, v_record, p_item.stored_answer, v_now);
    end if;
    return jsonb_build_object(
        'outcome', 'settled', 'status', p_item.status, 'cost_nanos', v_cost, 'overrun_nanos', v_due - v_cost,
        'balance_nanos', v_balance, 'user_id', v_record.user_id);
end $$;
revoke all on function public.settle_one(public.settlement_item, bigint[]) from public, anon, authenticated;
grant execute on function public.settle_one(public.settlement_item, bigint[]) to service_role;

-- The answer for a request that was settled before.
create function public.settlement_answer(p_request_id uuid, p_outcome text) returns jsonb
language sql stable as $$
    select jsonb_build_object(
        'outcome', p_outcome, 'status', r.status, 'cost_nanos', r.cost_nanos,
        'overrun_nanos', r.overrun_nanos, 'balance_nanos', u.credits_nanos, 'user_id', r.user_id)
    from public.usage_records r join public.users u on u.id = r.user_id where r.request_id = p_request_id
$$;
revoke all on function public.settlement_answer(uuid, text) from public, anon, authenticated;
grant execute on function public.settlement_answer(uuid, text) to service_role;

-- Counters
-- --------

-- Tokens count as far as they are known: embeddings have a prompt and no completion.
create function public.counted_tokens(p_prompt bigint, p_completion bigint, p_estimate bigint) returns bigint
language sql immutable as $$
    select case
        when p_prompt is null and p_completion is null then p_estimate
        else least(greatest(coalesce(p_prompt, 0)::numeric + coalesce(p_completion, 0), 0), 1e12)::bigint end
$$;
revoke all on function public.counted_tokens(bigint, bigint, bigint) from public, anon, authenticated;
grant execute on function public.counted_tokens(bigint, bigint, bigint) to service_role;

-- Gives slots and held budgets back, corrects the token counters, and adds the cost to the budgets of key and
-- end user.
create function public.release_counters(
    p_record public.usage_records, p_delta bigint, p_cost bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_then bigint := extract(epoch from p_record.created_at) * 1000;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_record.created_at at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_record.created_at at time zone 'UTC')::date;
    v_first boolean := p_record.status = 'pending';
    v_released int := v_first::int;
    v_window text;
    v_budget bigint;
    v_since timestamptz := '-infinity';
    v_spent bigint;
    v_level smallint;
    v_reached smallint;
begin
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        plan_day_tokens = greatest(
            0, plan_day_tokens + case when plan_day = v_day or p_delta > 0 then p_delta else 0 end),
        plan_month_tokens = greatest(
            0, plan_month_tokens + case when plan_month = v_month or p_delta > 0 then p_delta else 0 end),
        slots = greatest(0, slots - v_released),
        test_slots = greatest(
            0, test_slots - case when p_record.environment = 'test' then v_released else 0 end)
    where subject = 'user' and subject_id = p_record.user_id;
    -- Read now, not at admission: the budget may have been changed while the request ran.
    select k.budget_window, k.budget_nanos into v_window, v_budget from public.api_keys_new k
    where k.id = p_record.key_id;
    if v_window is not null then
        v_since := public.budget_start(v_window, p_now);
    end if;
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        slots = greatest(0, slots - v_released),
        budget_spent_nanos = greatest(
            0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(
            0, budget_held_nanos - case when v_first then p_record.hold_nanos else 0 end)
    where subject = 'key' and subject_id = p_record.key_id
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_budget is not null and p_cost > 0 then
        v_reached := public.note_budget_level(
            p_record, null, v_budget, v_window, v_since, v_spent, p_cost, v_level);
        if v_reached <> v_level then
            update public.rate_limit_usage set budget_level = v_reached
            where subject = 'key' and subject_id = p_record.key_id;
        end if;
    end if;
    if p_record.has_end_user_budget then
        perform public.release_end_user(p_record, p_cost, p_now);
    end if;
end $$;
revoke all on function public.release_counters(public.usage_records, bigint, bigint, timestamptz)
    from public, anon, authenticated;
grant execute on function public.release_counters(public.usage_records, bigint, bigint, timestamptz)
    to service_role;

-- Play money
-- ----------

-- What is left of play money's hold when the database has gone live. It leaves the account, as the unheld
-- play credits did.
create function public.expire_play_rest(p_record public.usage_records, p_cost bigint) returns void
language plpgsql as $$
declare
    v_rest bigint := p_record.hold_nanos - p_cost;
    v_balance bigint;
begin
    if p_record.mode <> 'sandbox' or p_record.status <> 'pending' or v_rest <= 0
       or not exists (select from public.gateway_state where mode = 'live') then
        return;
    end if;
    -- From a deleted account the rest went when the hold was released.
    select least(v_rest, credits_nanos - held_nanos) into v_rest from public.users
    where id = p_record.user_id;
    if v_rest <= 0 then
        return;
    end if;
    update public.users set credits_nanos = credits_nanos - v_rest where id = p_record.user_id
    returning credits_nanos into v_balance;
    insert into public.credit_transactions (user_id, kind, amount_nanos, balance_after_nanos, actor, reason)
    values (p_record.user_id, 'expiry', -v_rest, v_balance, 'gateway',
            'play credits end when the gateway goes live');
end $$;
revoke all on function public.expire_play_rest(public.usage_records, bigint) from public, anon, authenticated;
grant execute on function public.expire_play_rest(public.usage_records, bigint) to service_role;

-- Generation ids
-- --------------

-- Only while the request is pending: what was settled is not changed.
create function public.note_generation(p_item public.settlement_item, p_locked bigint[]) returns text
language plpgsql set search_path = '' as $$
declare
    v_user_id bigint;
begin
    select user_id into v_user_id from public.usage_records where request_id = p_item.request_id;
    if v_user_id is not null and v_user_id <> all (p_locked) then
        return 'busy';
    end if;
    update public.usage_records set generation_id = p_item.generation_id
    where request_id = p_item.request_id and status = 'pending';
    return case when found then 'noted' else 'settled' end;
end $$;
revoke all on function public.note_generation(public.settlement_item, bigint[])
    from public, anon, authenticated;
grant execute on function public.note_generation(public.settlement_item, bigint[]) to service_role;

-- Stores generation ids of requests that are still running, so that any instance can settle them.
create function public.note_generations(p_items jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_outcome text;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_outcome := public.note_generation(
                jsonb_populate_record(null::public.settlement_item, v_raw), v_locked);
        exception when others then
            v_outcome := 'failed';
        end;
        v_answers := v_answers
            || jsonb_build_object('outcome', v_outcome, 'request_id', v_raw -> 'request_id');
    end loop;
    return to_jsonb(v_answers);
end $$;
revoke all on function public.note_generations(jsonb) from public, anon, authenticated;
grant execute on function public.note_generations(jsonb) to service_role;
