-- Spend control inside the two hot calls: answers that are given again (Idempotency-Key, response cache), budgets of end users, soft limits,
-- users' own upstream keys, holds that are raised. What a request does not use costs it nothing: a table is only looked at when the
-- item, or a row that is read anyway, says so.

alter table public.users
    add column has_provider_key boolean not null default false,
    add column has_end_user_budgets boolean not null default false;
comment on column public.users.has_provider_key is 'Kept by a trigger: whether there is an active row in provider_keys.';
comment on column public.users.has_end_user_budgets is 'Kept by a trigger: whether there are rows in end_user_budgets.';

alter table public.usage_records
    add column has_idempotency_key boolean not null default false,
    add column has_end_user_budget boolean not null default false;
comment on column public.usage_records.has_idempotency_key is 'A row of stored_answers waits for how this request ends.';
comment on column public.usage_records.has_end_user_budget is 'Its hold counts in end_user_usage, and so does its cost.';

-- Answers are encrypted: nothing to compress.
alter table public.stored_answers alter column answer set storage external;
comment on column public.stored_answers.answer is
    'Empty for a finished request that was charged and whose answer was not kept: the same key is refused, as a second run would be charged again.';
comment on column public.stored_answers.fingerprint is
    'Of an idempotency key: SHA-256 of the raw body. Of the cache: which encryption key sealed the answer.';

alter type public.admission_item
    add attribute end_user text,
    add attribute price_basis jsonb,
    add attribute idempotency jsonb,
    add attribute cache jsonb,
    add attribute byok boolean;
alter type public.settlement_item
    add attribute stored_answer text,
    add attribute cache jsonb;
comment on type public.admission_item is
    'idempotency: {place, fingerprint, ttl_seconds}. cache: {place, fingerprint, ttl_seconds, clear}; without ttl_seconds the key''s own '
    'cache_ttl_seconds decides, and none means no cache. The answer''s cache_ttl is what applies; without `cache` it is the key''s own. byok: this instance sends under a user''s own upstream key where there is one; '
    'one of an older release does not, and pays for what it sends.';
comment on type public.settlement_item is
    'stored_answer: the sealed answer, for the idempotency key and the cache. cache: {place, fingerprint, ttl_seconds} where it is to be cached.';

-- Flags and what a deleted account leaves behind. Whoever writes these tables locks the user first, as everywhere: a trigger that did it
-- alone would come after the row's own lock, and two writers could meet in opposite orders.

create function public.note_spend_settings() returns trigger language plpgsql set search_path = '' as $$
declare
    v_user_id bigint := coalesce(new.user_id, old.user_id);
begin
    -- Locked by a statement of its own: what is counted below is then what the others have left.
    perform from public.users where id = v_user_id for no key update;
    update public.users u set has_provider_key = f.provider_key, has_end_user_budgets = f.budgets
    from (select exists (select from public.provider_keys p where p.user_id = v_user_id and p.is_active) as provider_key,
                 exists (select from public.end_user_budgets b where b.user_id = v_user_id) as budgets) as f
    where u.id = v_user_id and (u.has_provider_key, u.has_end_user_budgets) is distinct from (f.provider_key, f.budgets);
    return null;
end $$;
revoke all on function public.note_spend_settings() from public, anon, authenticated;
grant execute on function public.note_spend_settings() to service_role;
create trigger provider_keys_noted after insert or delete or update of is_active on public.provider_keys
    for each row execute function public.note_spend_settings();
create trigger end_user_budgets_noted after insert or delete on public.end_user_budgets
    for each row execute function public.note_spend_settings();

create function public.forget_account() returns trigger language plpgsql set search_path = '' as $$
begin
    delete from public.provider_keys where user_id = new.id;
    delete from public.webhooks where user_id = new.id;
    delete from public.budget_events where user_id = new.id;
    delete from public.end_user_budgets where user_id = new.id;
    delete from public.end_user_usage where user_id = new.id;
    delete from public.stored_answers where user_id = new.id;
    return null;
end $$;
comment on function public.forget_account is 'Secrets, addresses, names of customers and answers of a deleted account go with it.';
revoke all on function public.forget_account() from public, anon, authenticated;
grant execute on function public.forget_account() to service_role;
create trigger users_deleted_forget after update of deleted_at on public.users
    for each row when (old.deleted_at is null and new.deleted_at is not null) execute function public.forget_account();

-- A hold may be raised while its request runs; the rest of what a record is never changes.
drop trigger usage_records_identity on public.usage_records;
create trigger usage_records_identity before update of request_id, user_id, key_id, mode, environment, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();
create trigger usage_records_hold before update of hold_nanos on public.usage_records
    for each row when (old.status <> 'pending' or new.status <> 'pending' or new.hold_nanos < old.hold_nanos)
    execute function public.refuse_identity_change();

-- Budgets of end users. Counters are locked with their user.

-- What the budget of this end user leaves (their own, else that of '*'), null where none applies.
create function public.end_user_left(p_user_id bigint, p_end_user text, p_now timestamptz) returns bigint
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
    v_usage public.end_user_usage;
begin
    v_budget := public.end_user_budget(p_user_id, p_end_user);
    if v_budget.id is null then
        return null;
    end if;
    select * into v_usage from public.end_user_usage where user_id = p_user_id and end_user = p_end_user;
    if v_usage.budget_since < public.budget_start(v_budget.budget_window, p_now) then
        v_usage.budget_spent_nanos := 0;
    end if;
    return v_budget.budget_nanos - coalesce(v_usage.budget_spent_nanos + v_usage.budget_held_nanos, 0);
end $$;

create function public.end_user_budget(p_user_id bigint, p_end_user text) returns public.end_user_budgets
language plpgsql stable as $$
declare
    v_budget public.end_user_budgets;
begin
    select * into v_budget from public.end_user_budgets b where b.user_id = p_user_id and b.end_user in (p_end_user, '*')
    order by b.end_user = p_end_user desc limit 1;
    return v_budget;
end $$;
revoke all on function public.end_user_budget(bigint, text) from public, anon, authenticated;
grant execute on function public.end_user_budget(bigint, text) to service_role;
revoke all on function public.end_user_left(bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.end_user_left(bigint, text, timestamptz) to service_role;

create function public.hold_for_end_user(p_user_id bigint, p_end_user text, p_hold bigint) returns void
language plpgsql as $$
begin
    insert into public.end_user_usage as u (user_id, end_user, budget_held_nanos) values (p_user_id, p_end_user, p_hold)
    on conflict (user_id, end_user) do update set budget_held_nanos = u.budget_held_nanos + excluded.budget_held_nanos;
end $$;
revoke all on function public.hold_for_end_user(bigint, text, bigint) from public, anon, authenticated;
grant execute on function public.hold_for_end_user(bigint, text, bigint) to service_role;

-- Soft limits.

create function public.budget_level(p_spent bigint, p_budget bigint) returns smallint language plpgsql immutable as $$
declare
    v_percent numeric := case when p_budget > 0 then p_spent * 100.0 / p_budget else 0 end;
begin
    return case when v_percent >= 100 then 100 when v_percent >= 80 then 80 when v_percent >= 50 then 50 else 0 end;
end $$;
revoke all on function public.budget_level(bigint, bigint) from public, anon, authenticated;
grant execute on function public.budget_level(bigint, bigint) to service_role;

-- The level that is to be remembered after p_cost more was spent. A level that is reached for the first time in its window is an event,
-- with a delivery for each active webhook; of several reached at once only the highest is told. What was reached before counts by
-- today's budget: after a budget was raised its levels are told anew, after it was lowered the level that this reached is told.
create function public.note_budget_level(
    p_record public.usage_records, p_end_user text, p_budget bigint, p_window text, p_since timestamptz, p_spent bigint, p_cost bigint,
    p_level smallint
) returns smallint language plpgsql as $$
declare
    v_level smallint := public.budget_level(p_spent, p_budget);
    v_event bigint;
begin
    if v_level > least(p_level, public.budget_level(p_spent - p_cost, p_budget)) then
        insert into public.budget_events (user_id, key_id, end_user, level, budget_nanos, spent_nanos, budget_window, window_start, request_id)
        values (p_record.user_id, case when p_end_user is null then p_record.key_id end, p_end_user, v_level, p_budget, p_spent, p_window,
                p_since, p_record.request_id)
        returning id into v_event;
        insert into public.webhook_deliveries (event_id, webhook_id, user_id)
        select v_event, w.id, w.user_id from public.webhooks w where w.user_id = p_record.user_id and w.is_active order by w.id;
    end if;
    return v_level;
end $$;
revoke all on function public.note_budget_level(public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint)
    from public, anon, authenticated;
grant execute on function public.note_budget_level(public.usage_records, text, bigint, text, timestamptz, bigint, bigint, smallint)
    to service_role;

-- Answers that are given again.

-- A hold as those get it who are to find out what became of it.
create function public.hold_json(p_record public.usage_records) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object('request_id', p_record.request_id, 'generation_id', p_record.generation_id, 'mode', p_record.mode,
                              'environment', p_record.environment, 'byok', p_record.byok,
                              'provider_key', case when p_record.byok then (select k.encrypted_key from public.provider_keys k
                                                                            where k.user_id = p_record.user_id) end);
end $$;
revoke all on function public.hold_json(public.usage_records) from public, anon, authenticated;
grant execute on function public.hold_json(public.usage_records) to service_role;

-- What this idempotency key has been used for, null where it is free. A replay is no admitted request: it is neither recorded nor
-- charged, and no limit stands in its way, as its answer has been paid for.
-- Outcomes: replayed, idempotency_running (with `expired`, where its instance seems to be gone), idempotency_conflict (another body),
-- idempotency_not_kept (charged, but its answer was not kept).
create function public.check_idempotency(p_item public.admission_item, p_key public.api_keys_new, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_row public.stored_answers;
    v_record public.usage_records;
    v_base jsonb;
begin
    select * into v_row from public.stored_answers
    where user_id = p_key.user_id and kind = 'idempotency' and place = p_item.idempotency ->> 'place';
    if not found or (v_row.state = 'finished' and v_row.expires_at <= p_now) then
        return null;
    end if;
    select * into v_record from public.usage_records where request_id = v_row.request_id;
    if v_row.state = 'running' and v_record.status is distinct from 'pending' then
        return null;
    end if;
    v_base := jsonb_build_object('user_id', p_key.user_id, 'key_id', p_key.id, 'environment', v_record.environment,
                                 'original_request_id', v_row.request_id, 'status', v_record.status, 'cost_nanos', v_record.cost_nanos,
                                 'balance_after_nanos', v_record.balance_after_nanos);
    if v_row.fingerprint <> p_item.idempotency ->> 'fingerprint' then
        return v_base || jsonb_build_object('outcome', 'idempotency_conflict');
    elsif v_row.state = 'running' then
        return v_base || jsonb_build_object(
            'outcome', 'idempotency_running',
            'retry_after', least(30, greatest(1, ceil(extract(epoch from p_now - v_record.created_at) / 2)))::int,
            'expired', case when v_record.expires_at <= p_now then jsonb_build_array(public.hold_json(v_record)) end);
    elsif v_row.answer = '' then
        return v_base || jsonb_build_object('outcome', 'idempotency_not_kept');
    end if;
    return v_base || jsonb_build_object('outcome', 'replayed', 'answer', v_row.answer,
                                        'age', floor(extract(epoch from p_now - v_row.created_at))::bigint,
                                        'tokens', coalesce(v_record.prompt_tokens, 0) + coalesce(v_record.completion_tokens, 0));
end $$;
revoke all on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz) from public, anon, authenticated;
grant execute on function public.check_idempotency(public.admission_item, public.api_keys_new, timestamptz) to service_role;

-- The key is this request's from now on, running or, with an answer from the cache, finished.
create function public.claim_idempotency(p_item public.admission_item, p_user_id bigint, p_answer text, p_now timestamptz) returns void
language plpgsql as $$
begin
    insert into public.stored_answers as a (kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    values ('idempotency', p_user_id, p_item.idempotency ->> 'place', p_item.idempotency ->> 'fingerprint', p_item.request_id,
            case when p_answer is null then 'running' else 'finished' end, p_answer, p_now,
            p_now + make_interval(secs => greatest((p_item.idempotency ->> 'ttl_seconds')::int, p_item.ttl_seconds)))
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, state = excluded.state, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.claim_idempotency(public.admission_item, bigint, text, timestamptz) to service_role;

-- The request that had the key has ended: its answer is kept; without one the key is free again, unless somebody paid for the request.
create function public.finish_idempotency(p_request_id uuid, p_answer text, p_paid boolean) returns void
language plpgsql as $$
begin
    if p_answer is null and not p_paid then
        delete from public.stored_answers where request_id = p_request_id and kind = 'idempotency';
    else
        update public.stored_answers set state = 'finished', answer = coalesce(p_answer, '')
        where request_id = p_request_id and kind = 'idempotency' and state = 'running';
    end if;
end $$;
revoke all on function public.finish_idempotency(uuid, text, boolean) from public, anon, authenticated;
grant execute on function public.finish_idempotency(uuid, text, boolean) to service_role;

-- The cached answer of this place, sealed by an encryption key that the instance still seals with; cleared first where that is wanted.
create function public.find_cached(p_cache jsonb, p_user_id bigint, p_now timestamptz) returns public.stored_answers
language plpgsql as $$
declare
    v_row public.stored_answers;
begin
    if (p_cache ->> 'clear')::boolean then
        delete from public.stored_answers where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place';
    else
        select * into v_row from public.stored_answers
        where user_id = p_user_id and kind = 'cache' and place = p_cache ->> 'place' and fingerprint = p_cache ->> 'fingerprint'
          and expires_at > p_now;
    end if;
    return v_row;
end $$;
revoke all on function public.find_cached(jsonb, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.find_cached(jsonb, bigint, timestamptz) to service_role;

create function public.keep_in_cache(p_cache jsonb, p_record public.usage_records, p_answer text, p_now timestamptz) returns void
language plpgsql as $$
begin
    -- The user is locked: whether the account is deleted does not change meanwhile.
    insert into public.stored_answers (kind, user_id, place, fingerprint, request_id, state, answer, created_at, expires_at)
    select 'cache', u.id, p_cache ->> 'place', p_cache ->> 'fingerprint', p_record.request_id, 'finished', p_answer, p_now,
           p_now + make_interval(secs => (p_cache ->> 'ttl_seconds')::int)
    from public.users u where u.id = p_record.user_id and u.deleted_at is null
    on conflict (user_id, kind, place) do update set
        fingerprint = excluded.fingerprint, request_id = excluded.request_id, answer = excluded.answer,
        created_at = excluded.created_at, expires_at = excluded.expires_at;
end $$;
revoke all on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz) from public, anon, authenticated;
grant execute on function public.keep_in_cache(jsonb, public.usage_records, text, timestamptz) to service_role;

create function public.cached_json(p_row public.stored_answers, p_now timestamptz) returns jsonb language plpgsql immutable as $$
begin
    return jsonb_build_object('outcome', 'cached', 'answer', p_row.answer, 'original_request_id', p_row.request_id,
                              'age', floor(extract(epoch from p_now - p_row.created_at))::bigint);
end $$;
revoke all on function public.cached_json(public.stored_answers, timestamptz) from public, anon, authenticated;
grant execute on function public.cached_json(public.stored_answers, timestamptz) to service_role;

-- At most a thousand answers whose time is over; returns how many. It waits for nobody: a row that admission is working on is not expired
-- any more when that is done.
create function public.delete_expired_answers() returns int language plpgsql set search_path = '' as $$
declare
    v_count int;
begin
    with expired as (
        select a.id from public.stored_answers a
        where a.expires_at <= clock_timestamp() and (a.state = 'finished' or not exists (
            select from public.usage_records r where r.request_id = a.request_id and r.status = 'pending'))
        order by a.expires_at limit 1000 for update skip locked
    )
    delete from public.stored_answers a using expired e where a.id = e.id;
    get diagnostics v_count = row_count;
    return v_count;
end $$;
revoke all on function public.delete_expired_answers() from public, anon, authenticated;
grant execute on function public.delete_expired_answers() to service_role;

-- Admission.

-- A budget of another window is emptied, with the level that was told of it; rings and plan counters as before.
create or replace function public.advance_usage(p_usage public.rate_limit_usage, p_now timestamptz, p_budget_window text)
returns public.rate_limit_usage language plpgsql stable as $$
declare
    v_usage public.rate_limit_usage := p_usage;
    v_ms bigint := extract(epoch from p_now) * 1000;
    v_day date := (p_now at time zone 'UTC')::date;
    v_month date := date_trunc('month', p_now at time zone 'UTC')::date;
    v_since timestamptz;
begin
    v_usage.burst_ring := public.advance_ring(v_usage.burst_ring, 11, v_ms / 100);
    v_usage.minute_ring := public.advance_ring(v_usage.minute_ring, 7, v_ms / 10000);
    v_usage.hour_ring := public.advance_ring(v_usage.hour_ring, 13, v_ms / 300000);
    v_usage.day_ring := public.advance_ring(v_usage.day_ring, 25, v_ms / 3600000);
    if v_usage.plan_day < v_day then
        v_usage.plan_day := v_day;
        v_usage.plan_day_requests := 0;
        v_usage.plan_day_tokens := 0;
    end if;
    if v_usage.plan_month < v_month then
        v_usage.plan_month := v_month;
        v_usage.plan_month_requests := 0;
        v_usage.plan_month_tokens := 0;
    end if;
    if p_budget_window is not null then
        v_since := public.budget_start(p_budget_window, p_now);
        if v_usage.budget_since < v_since then
            v_usage.budget_since := v_since;
            v_usage.budget_spent_nanos := 0;
            v_usage.budget_level := 0;
        end if;
    end if;
    return v_usage;
end $$;

drop function public.recount_user(bigint, bigint, timestamptz);
-- Up to four expired holds of a user, once in ten seconds, and slots and held budgets counted anew from the journal.
create function public.recount_user(p_user_id bigint, p_key_id bigint, p_end_user text, p_now timestamptz) returns jsonb
language plpgsql as $$
declare
    v_since timestamptz;
    v_expired jsonb;
begin
    select pending_since into v_since from public.rate_limit_usage
    where subject = 'user' and subject_id = p_user_id and recounted_at < p_now - interval '10 seconds';
    if not found then
        return null;
    end if;
    with pending as (
        select r.* from public.usage_records r
        where r.user_id = p_user_id and r.created_at >= v_since and r.status = 'pending'
    ), recounted as (
        update public.rate_limit_usage u set recounted_at = p_now,
            pending_since = coalesce((select min(created_at) from pending), p_now),
            slots = (select count(*) from pending),
            test_slots = (select count(*) from pending where environment = 'test')
        where u.subject = 'user' and u.subject_id = p_user_id
    ), recounted_key as (
        update public.rate_limit_usage u set
            slots = (select count(*) from pending where key_id = p_key_id),
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where key_id = p_key_id), 0)
        where u.subject = 'key' and u.subject_id = p_key_id
    ), recounted_end_user as (
        update public.end_user_usage u set
            budget_held_nanos = coalesce((select sum(hold_nanos) from pending where end_user = p_end_user and has_end_user_budget), 0)
        where u.user_id = p_user_id and u.end_user = p_end_user
    )
    select jsonb_agg(public.hold_json(e.record)) into v_expired
    from (select p::public.usage_records as record from pending p where p.expires_at <= p_now order by random() limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is 'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker running.';
revoke all on function public.recount_user(bigint, bigint, text, timestamptz) from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, text, timestamptz) to service_role;

drop function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage, public.rate_limit_usage, bigint,
                                      bigint, timestamptz);
-- Counts and writes the record of a request that nothing refuses: pending with its hold, or, with an answer from the cache, completed
-- at no cost and no tokens.
create function public.record_admission(
    p_item public.admission_item, p_key public.api_keys_new, p_key_usage public.rate_limit_usage, p_user_usage public.rate_limit_usage,
    p_granted bigint, p_hold bigint, p_byok boolean, p_end_user_budget boolean, p_cached_balance bigint, p_now timestamptz
) returns void language plpgsql as $$
declare
    v_cached boolean := p_cached_balance is not null;
    v_need bigint := case when v_cached then 0 else p_item.prompt_estimate end;
    v_slot int := (not v_cached)::int;
    v_none bigint := case when v_cached then 0 end;
begin
    insert into public.usage_records (request_id, client_request_id, user_id, key_id, mode, environment, endpoint, model, prompt_estimate,
                                      output_granted, hold_nanos, markup, streamed, created_at, expires_at, end_user, byok, price_basis,
                                      has_idempotency_key, has_end_user_budget, cache_hit, status, settlement_source, settled_at,
                                      balance_after_nanos, prompt_tokens, completion_tokens, upstream_cost_nanos)
    values (p_item.request_id, left(p_item.client_request_id, 256), p_key.user_id, p_key.id, p_item.mode, p_key.environment_tag, p_item.endpoint,
            p_item.models[1], v_need, p_granted, p_hold, p_item.markup, p_item.streamed, p_now,
            p_now + make_interval(secs => p_item.ttl_seconds), p_item.end_user, p_byok, p_item.price_basis,
            p_item.idempotency is not null, p_end_user_budget, v_cached, case when v_cached then 'completed' else 'pending' end,
            case when v_cached then 'usage' end, case when v_cached then p_now end, p_cached_balance, v_none, v_none, v_none);
    if p_hold > 0 then
        update public.users set held_nanos = held_nanos + p_hold where id = p_key.user_id;
        if p_end_user_budget then
            perform public.hold_for_end_user(p_key.user_id, p_item.end_user, p_hold);
        end if;
    end if;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_user_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_user_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_user_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_user_usage.day_ring, 25, null, 1, v_need),
        plan_day = p_user_usage.plan_day, plan_day_requests = p_user_usage.plan_day_requests + 1,
        plan_day_tokens = p_user_usage.plan_day_tokens + v_need,
        plan_month = p_user_usage.plan_month, plan_month_requests = p_user_usage.plan_month_requests + 1,
        plan_month_tokens = p_user_usage.plan_month_tokens + v_need,
        slots = slots + v_slot, test_slots = test_slots + case when p_key.environment_tag = 'test' then v_slot else 0 end,
        requests_used = requests_used + 1, last_used_at = p_now,
        pending_since = case when slots = 0 then p_now else least(pending_since, p_now) end
    where subject = 'user' and subject_id = p_key.user_id;
    update public.rate_limit_usage set
        burst_ring = public.count_in_ring(p_key_usage.burst_ring, 11, null, 1, v_need),
        minute_ring = public.count_in_ring(p_key_usage.minute_ring, 7, null, 1, v_need),
        hour_ring = public.count_in_ring(p_key_usage.hour_ring, 13, null, 1, v_need),
        day_ring = public.count_in_ring(p_key_usage.day_ring, 25, null, 1, v_need),
        slots = slots + v_slot, requests_used = requests_used + 1, last_used_at = p_now,
        budget_since = p_key_usage.budget_since, budget_spent_nanos = p_key_usage.budget_spent_nanos, budget_level = p_key_usage.budget_level,
        budget_held_nanos = budget_held_nanos + p_hold
    where subject = 'key' and subject_id = p_key.id;
end $$;
revoke all on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, boolean, boolean, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.record_admission(public.admission_item, public.api_keys_new, public.rate_limit_usage,
    public.rate_limit_usage, bigint, bigint, boolean, boolean, bigint, timestamptz) to service_role;

create or replace function public.refuse_for_limits(
    p_item public.admission_item, p_key public.api_keys_new, p_state public.limit_state, p_now timestamptz
) returns jsonb language plpgsql as $$
begin
    return jsonb_build_object(
        'outcome', case when p_state.refused_window = 'concurrency' then 'concurrency'
                        when p_state.refused_window like 'plan %' then 'plan_limit' else 'rate_limit' end,
        'window', p_state.refused_window, 'unit', p_state.refused_unit, 'limit', p_state.refused_limit,
        'need', p_item.prompt_estimate, 'never', p_state.never, 'retry_after', public.retry_after_seconds(p_state.frees_at_ms, p_now),
        'limits', public.limits_json(p_state, p_now),
        'expired', case when p_state.refused_window = 'concurrency'
                        then public.recount_user(p_key.user_id, p_key.id, p_item.end_user, p_now) end);
end $$;

-- The refusal of a request that the least of credits, key budget and end user's budget does not cover.
create function public.refuse_for_money(
    p_item public.admission_item, p_credits bigint, p_held bigint, p_available bigint, p_budget bigint, p_end_user_left bigint, p_granted bigint
) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object(
        'outcome', case when p_end_user_left < least(p_available, p_budget) then 'end_user_budget'
                        when p_budget < p_available then 'budget' else 'credits' end,
        'needed_nanos', ceil((p_item.fixed_nanos + p_item.output_nanos * p_item.min_output) * p_item.markup),
        'available_nanos', greatest(0, least(p_available, p_budget, p_end_user_left)), 'balance_nanos', p_credits,
        'held_nanos', p_held, 'affordable_output', greatest(0, p_granted));
end $$;
revoke all on function public.refuse_for_money(public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint)
    from public, anon, authenticated;
grant execute on function public.refuse_for_money(public.admission_item, bigint, bigint, bigint, bigint, bigint, bigint) to service_role;

-- The answer to a request that passed the identity checks: limits, cache, budgets and credits decide, in this order.
create or replace function public.admit_checked(
    p_item public.admission_item, p_key public.api_keys_new, p_user public.users, p_now timestamptz
) returns jsonb language plpgsql as $$
declare
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
    v_user_usage public.rate_limit_usage;
    v_plan public.plans := public.current_plan(p_user, p_now);
    v_state public.limit_state;
    v_test boolean := p_key.environment_tag = 'test';
    v_provider_key text;
    v_cache_ttl int := p_key.cache_ttl_seconds;
    v_cached public.stored_answers;
    v_budget bigint;
    v_end_user_left bigint;
    v_available bigint := p_user.credits_nanos - p_user.held_nanos;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
    v_answer jsonb;
begin
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then -- without counters nothing would be limited
        insert into public.rate_limit_usage (subject, subject_id) values ('user', p_user.id) returning * into v_user_usage;
    end if;
    select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
    if not found then
        insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
        values ('key', p_key.id, null, null, null, null)
        returning * into v_key_usage;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found and v_key_usage.day_ring is null then
        v_key_usage.burst_ring := public.empty_ring(11);
        v_key_usage.minute_ring := public.empty_ring(7);
        v_key_usage.hour_ring := public.empty_ring(13);
        v_key_usage.day_ring := public.empty_ring(25);
    end if;
    v_user_usage := public.advance_usage(v_user_usage, p_now, null);
    v_key_usage := public.advance_usage(v_key_usage, p_now, p_key.budget_window);
    if v_key_usage.requests_used >= p_key.max_requests then
        return public.refusal('REQUEST_LIMIT_EXCEEDED', p_item, p_user.id, p_key.id) || jsonb_build_object('limit', p_key.max_requests);
    elsif v_plan.allowed_models is not null and not public.models_allowed(v_plan.allowed_models, p_item.models) then
        return jsonb_build_object('outcome', 'MODEL_NOT_ALLOWED');
    elsif not v_test and p_user.subscription_status = 'trial' and p_user.trial_expires_at <= p_now then
        return jsonb_build_object('outcome', 'trial_expired');
    end if;
    if p_item.cache is not null then
        v_cache_ttl := coalesce((p_item.cache ->> 'ttl_seconds')::int, v_cache_ttl);
        if v_cache_ttl is not null then
            v_cached := public.find_cached(p_item.cache, p_user.id, p_now);
        end if;
    end if;
    v_state := public.check_all_limits(p_key, p_user, v_plan, v_key_limits, v_key_usage, v_user_usage,
                                       case when v_cached.id is null then p_item.prompt_estimate else 0 end, p_now);
    if v_state.refused_window is not null then
        return public.refuse_for_limits(p_item, p_key, v_state, p_now);
    end if;
    v_state.request_left := v_state.request_left - 1;
    if v_cached.id is not null then
        perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, 0, 0, false, false, p_user.credits_nanos, p_now);
        return public.cached_json(v_cached, p_now) || jsonb_build_object(
            'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag, 'status', 'completed', 'cost_nanos', 0,
            'balance_after_nanos', p_user.credits_nanos, 'limits', public.limits_json(v_state, p_now));
    end if;
    if p_user.has_provider_key and p_item.byok and not v_test then
        select encrypted_key into v_provider_key from public.provider_keys where user_id = p_user.id and is_active;
    end if;
    if not v_test and v_provider_key is null then
        v_budget := p_key.budget_nanos - v_key_usage.budget_spent_nanos - v_key_usage.budget_held_nanos;
        if p_user.has_end_user_budgets and p_item.end_user is not null then
            v_end_user_left := public.end_user_left(p_user.id, p_item.end_user, p_now);
        end if;
        v_granted := public.affordable_output(p_item, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(p_item, p_user.credits_nanos, p_user.held_nanos, v_available, v_budget, v_end_user_left, v_granted)
                || jsonb_build_object(
                    'limits', public.limits_json(v_state, p_now),
                    'expired', case when p_user.held_nanos > 0 then public.recount_user(p_user.id, p_key.id, p_item.end_user, p_now) end);
        end if;
        v_hold := ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * p_item.markup);
    end if;
    perform public.record_admission(p_item, p_key, v_key_usage, v_user_usage, v_granted, v_hold, v_provider_key is not null,
                                    v_end_user_left is not null, null, p_now);
    v_state.token_left := v_state.token_left - p_item.prompt_estimate;
    v_answer := jsonb_build_object('outcome', 'admitted', 'user_id', p_user.id, 'key_id', p_key.id, 'environment', p_key.environment_tag,
                                   'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', p_user.credits_nanos,
                                   'limits', public.limits_json(v_state, p_now));
    if v_provider_key is not null then
        v_answer := v_answer || jsonb_build_object('byok', true, 'provider_key', v_provider_key);
    end if;
    if v_cache_ttl is not null then
        v_answer := v_answer || jsonb_build_object('cache_ttl', v_cache_ttl);
    end if;
    return v_answer;
end $$;

-- The first answer to a request id that was sent before, when its reply was lost.
create or replace function public.repeat_admission(p_item public.admission_item) returns jsonb
language plpgsql stable as $$
declare
    v_record public.usage_records;
    v_cached public.stored_answers;
    v_answer jsonb;
begin
    select * into v_record from public.usage_records
    where request_id = p_item.request_id and key_id = public.find_key(p_item.hashes);
    if not found then
        return null;
    end if;
    v_answer := jsonb_build_object('outcome', 'admitted', 'user_id', v_record.user_id, 'key_id', v_record.key_id,
                                   'environment', v_record.environment, 'granted_output', v_record.output_granted,
                                   'hold_nanos', v_record.hold_nanos, 'limits', '{}'::jsonb,
                                   'balance_nanos', (select u.credits_nanos from public.users u where u.id = v_record.user_id));
    if v_record.cache_hit then
        select * into v_cached from public.stored_answers
        where user_id = v_record.user_id and kind = 'cache' and place = p_item.cache ->> 'place';
        if not found then -- cleared within moments: it is settled, and nothing more can be had under its id
            return jsonb_build_object('outcome', 'busy');
        end if;
        return v_answer || public.cached_json(v_cached, clock_timestamp())
            || jsonb_build_object('status', 'completed', 'cost_nanos', 0, 'balance_after_nanos', v_record.balance_after_nanos);
    end if;
    if v_record.byok then
        v_answer := v_answer || public.hold_json(v_record);
    end if;
    return v_answer || (select jsonb_strip_nulls(jsonb_build_object(
        'cache_ttl', coalesce((p_item.cache ->> 'ttl_seconds')::int, k.cache_ttl_seconds)))
        from public.api_keys_new k where k.id = v_record.key_id);
end $$;

-- The rate limits' state that admission would report for a request of no tokens; counts nothing.
create function public.verified_limits(p_key public.api_keys_new, p_user public.users, p_now timestamptz) returns jsonb
language plpgsql stable as $$
declare
    v_none public.rate_limit_usage;
    v_user_usage public.rate_limit_usage;
    v_key_usage public.rate_limit_usage;
    v_key_limits public.rate_limit_configs;
begin
    v_none.burst_ring := public.empty_ring(11);
    v_none.minute_ring := public.empty_ring(7);
    v_none.hour_ring := public.empty_ring(13);
    v_none.day_ring := public.empty_ring(25);
    v_none.plan_day := '-infinity';
    v_none.plan_month := '-infinity';
    v_none.slots := 0;
    v_none.test_slots := 0;
    select * into v_user_usage from public.rate_limit_usage where subject = 'user' and subject_id = p_user.id;
    if not found then
        v_user_usage := v_none;
    end if;
    select * into v_key_limits from public.rate_limit_configs where subject = 'key' and subject_id = p_key.id;
    if found then
        select * into v_key_usage from public.rate_limit_usage where subject = 'key' and subject_id = p_key.id;
        if v_key_usage.day_ring is null then -- not limited before, so nothing was counted
            v_none.slots := coalesce(v_key_usage.slots, 0);
            v_key_usage := v_none;
        end if;
    end if;
    return public.limits_json(public.check_all_limits(
        p_key, p_user, public.current_plan(p_user, p_now), v_key_limits, public.advance_usage(v_key_usage, p_now, null),
        public.advance_usage(v_user_usage, p_now, null), 0, p_now), p_now);
end $$;
comment on function public.verified_limits is 'What the headers of management answers say; management requests themselves are not counted.';
revoke all on function public.verified_limits(public.api_keys_new, public.users, timestamptz) from public, anon, authenticated;
grant execute on function public.verified_limits(public.api_keys_new, public.users, timestamptz) to service_role;

create or replace function public.admit_one(p_item public.admission_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_key public.api_keys_new;
    v_user public.users;
    v_owner bigint;
    v_refusal text;
    v_answer jsonb;
begin
    if p_item.resent then
        v_answer := public.repeat_admission(p_item);
        if v_answer is not null then
            return v_answer;
        end if;
    end if;
    select * into v_key from public.api_keys_new where id = public.find_key(p_item.hashes);
    if not found and p_item.legacy_hash is not null then
        select user_id into v_owner from public.api_keys where key_sha256 = p_item.legacy_hash and moved_to is null;
        if v_owner = any (p_locked) then
            v_key := public.move_legacy_key(p_item.legacy_hash, p_item.hashes[1], p_item.secret_id);
        end if;
    end if;
    v_owner := coalesce(v_key.user_id, v_owner);
    if v_owner is not null and v_owner <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    end if;
    select * into v_user from public.users where id = v_key.user_id;
    if not exists (select from public.gateway_state where mode = p_item.mode) then
        return jsonb_build_object('outcome', 'wrong_mode');
    end if;
    v_refusal := public.refuse_identity(v_key, v_user, p_item, v_now);
    if v_refusal is not null then
        return public.refusal(v_refusal, p_item, v_user.id, v_key.id);
    end if;
    if v_key.hash_secret_id <> p_item.secret_id and v_key.key_hash = any (p_item.hashes) then
        update public.api_keys_new set key_hash = p_item.hashes[1], hash_secret_id = p_item.secret_id where id = v_key.id;
    end if;
    if p_item.holds then
        if p_item.idempotency is null then
            return public.admit_checked(p_item, v_key, v_user, v_now);
        end if;
        v_answer := public.check_idempotency(p_item, v_key, v_now);
        if v_answer is null then
            v_answer := public.admit_checked(p_item, v_key, v_user, v_now);
            if v_answer ->> 'outcome' in ('admitted', 'cached') then -- a refusal leaves the key free
                perform public.claim_idempotency(p_item, v_user.id, v_answer ->> 'answer', v_now);
            end if;
        end if;
        return v_answer;
    end if;
    return jsonb_build_object('outcome', 'verified', 'user_id', v_user.id, 'key_id', v_key.id, 'environment', v_key.environment_tag,
                              'role', v_user.role, 'outdated', v_key.key_hash <> all (p_item.hashes), 'key_name', v_key.key_name, 'key_prefix', v_key.key_prefix, 'last4', v_key.last4,
                              'scopes', v_key.scope_permissions,
                              'limits', public.verified_limits(v_key, v_user, v_now));
end $$;
comment on function public.admit_requests is
    'Decides for each item (admission_item) in order. Answers carry request_id and outcome: admitted, cached, replayed, verified, busy, '
    'wrong_mode, failed, or the code of a refusal.';

-- Settlement.

drop function public.write_settlement(public.settlement_item, bigint, bigint, bigint, timestamptz); -- settle_one does it itself
drop function public.release_counters(public.usage_records, text, bigint, bigint, timestamptz);
-- Gives slots and held budgets back, corrects the token counters, and adds the cost to the budgets of key and end user.
create function public.release_counters(p_record public.usage_records, p_delta bigint, p_cost bigint, p_now timestamptz) returns void
language plpgsql as $$
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
        plan_day_tokens = greatest(0, plan_day_tokens + case when plan_day = v_day or p_delta > 0 then p_delta else 0 end),
        plan_month_tokens = greatest(0, plan_month_tokens + case when plan_month = v_month or p_delta > 0 then p_delta else 0 end),
        slots = greatest(0, slots - v_released),
        test_slots = greatest(0, test_slots - case when p_record.environment = 'test' then v_released else 0 end)
    where subject = 'user' and subject_id = p_record.user_id;
    select k.budget_window, k.budget_nanos into v_window, v_budget from public.api_keys_new k where k.id = p_record.key_id;
    if v_window is not null then
        v_since := public.budget_start(v_window, p_now);
    end if;
    update public.rate_limit_usage set
        minute_ring = public.correct_ring(minute_ring, 7, v_then / 10000, v_ms / 10000, p_delta),
        hour_ring = public.correct_ring(hour_ring, 13, v_then / 300000, v_ms / 300000, p_delta),
        day_ring = public.correct_ring(day_ring, 25, v_then / 3600000, v_ms / 3600000, p_delta),
        slots = greatest(0, slots - v_released),
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when v_first then p_record.hold_nanos else 0 end)
    where subject = 'key' and subject_id = p_record.key_id
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_budget is not null and p_cost > 0 then
        v_reached := public.note_budget_level(p_record, null, v_budget, v_window, v_since, v_spent, p_cost, v_level);
        if v_reached <> v_level then
            update public.rate_limit_usage set budget_level = v_reached where subject = 'key' and subject_id = p_record.key_id;
        end if;
    end if;
    if p_record.has_end_user_budget then
        perform public.release_end_user(p_record, p_cost, p_now);
    end if;
end $$;

create function public.release_end_user(p_record public.usage_records, p_cost bigint, p_now timestamptz) returns void
language plpgsql as $$
declare
    v_budget public.end_user_budgets := public.end_user_budget(p_record.user_id, p_record.end_user);
    v_since timestamptz := public.budget_start(v_budget.budget_window, p_now);
    v_spent bigint;
    v_level smallint;
    v_reached smallint;
begin
    update public.end_user_usage set
        budget_spent_nanos = greatest(0, case when budget_since < v_since then 0 else budget_spent_nanos end + p_cost),
        budget_level = case when budget_since < v_since then 0 else budget_level end,
        budget_since = greatest(budget_since, v_since),
        budget_held_nanos = greatest(0, budget_held_nanos - case when p_record.status = 'pending' then p_record.hold_nanos else 0 end)
    where user_id = p_record.user_id and end_user = p_record.end_user
    returning budget_spent_nanos, budget_level into v_spent, v_level;
    if v_level is null or v_budget.id is null or p_cost <= 0 then
        return;
    end if;
    v_reached := public.note_budget_level(p_record, p_record.end_user, v_budget.budget_nanos, v_budget.budget_window, v_since, v_spent, p_cost,
                                          v_level);
    if v_reached <> v_level then
        update public.end_user_usage set budget_level = v_reached where user_id = p_record.user_id and end_user = p_record.end_user;
    end if;
end $$;
revoke all on function public.release_end_user(public.usage_records, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_end_user(public.usage_records, bigint, timestamptz) to service_role;
revoke all on function public.release_counters(public.usage_records, bigint, bigint, timestamptz) from public, anon, authenticated;
grant execute on function public.release_counters(public.usage_records, bigint, bigint, timestamptz) to service_role;

-- Under the user's own upstream key nothing is due: what the upstream reports is recorded for them.
create or replace function public.settle_one(p_item public.settlement_item, p_locked bigint[]) returns jsonb
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
    elsif v_record.status <> 'pending' and (v_record.settlement_source <> 'none' or p_item.source = 'none') then
        return public.settlement_answer(p_item.request_id, 'repeated');
    end if;
    if v_record.status = 'pending' then
        v_held := v_record.hold_nanos;
        v_before := v_record.prompt_estimate;
    else
        v_before := public.counted_tokens(v_record.prompt_tokens, v_record.completion_tokens, v_record.prompt_estimate);
    end if;
    if v_record.environment = 'test' then
        v_upstream := 0;
        v_due := 0;
    elsif v_record.byok then
        v_due := 0;
    else
        v_due := ceil(p_item.billable_nanos * v_record.markup);
    end if;
    -- Unheld credits of a live database are real money: play money's requests cost no more than what was held for them.
    select case when v_record.mode = s.mode then u.credits_nanos - u.held_nanos else 0 end into v_unheld
    from public.users u, public.gateway_state s where u.id = v_record.user_id;
    v_cost := least(v_due, v_record.cost_nanos + v_held + v_unheld);
    update public.users set credits_nanos = credits_nanos - (v_cost - v_record.cost_nanos), held_nanos = held_nanos - v_held
    where id = v_record.user_id returning credits_nanos, deleted_at into v_balance, v_deleted_at;
    perform public.release_counters(
        v_record, public.counted_tokens(p_item.prompt_tokens, p_item.completion_tokens, v_record.prompt_estimate) - v_before,
        v_cost - v_record.cost_nanos, v_now);
    if v_record.mode = 'sandbox' then
        perform public.expire_play_rest(v_record, v_cost);
    end if;
    if v_record.mode = 'sandbox' or v_deleted_at is not null then -- more may have left the account just now
        select credits_nanos into v_balance from public.users where id = v_record.user_id;
    end if;
    update public.usage_records set
        status = p_item.status, settlement_source = p_item.source, settled_at = v_now,
        upstream_cost_nanos = v_upstream, cost_nanos = v_cost, overrun_nanos = v_due - v_cost, balance_after_nanos = v_balance,
        prompt_tokens = p_item.prompt_tokens, completion_tokens = p_item.completion_tokens,
        cached_tokens = p_item.cached_tokens, reasoning_tokens = p_item.reasoning_tokens,
        model_used = coalesce(p_item.model_used, model_used), provider = coalesce(p_item.provider, provider),
        finish_reason = coalesce(p_item.finish_reason, finish_reason), error_code = coalesce(p_item.error_code, error_code),
        latency_ms = coalesce(latency_ms, p_item.latency_ms),
        time_to_first_token_ms = coalesce(time_to_first_token_ms, p_item.time_to_first_token_ms),
        generation_id = coalesce(left(p_item.generation_id, 256), generation_id)
    where request_id = p_item.request_id;
    if v_record.has_idempotency_key and v_record.status = 'pending' then
        perform public.finish_idempotency(v_record.request_id, p_item.stored_answer, v_cost > 0 or (v_record.byok and v_upstream > 0));
    end if;
    if p_item.cache is not null and p_item.stored_answer is not null and p_item.status = 'completed' then
        perform public.keep_in_cache(p_item.cache, v_record, p_item.stored_answer, v_now);
    end if;
    return jsonb_build_object('outcome', 'settled', 'status', p_item.status, 'cost_nanos', v_cost, 'overrun_nanos', v_due - v_cost,
                              'balance_nanos', v_balance, 'user_id', v_record.user_id);
end $$;

create or replace function public.list_expired_holds(p_limit int, p_skip int default 0) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_holds jsonb;
begin
    with expired as (
        select r as record, r.expires_at from public.usage_records r
        where r.expires_at >= (select swept_until from public.gateway_state) and r.expires_at <= v_now and r.status = 'pending'
        order by r.expires_at limit p_limit offset p_skip
    ), moved as (
        update public.gateway_state set swept_until = m.until
        from (select least(min(expires_at), v_now - interval '1 minute') as until from expired) as m
        where singleton and swept_until < m.until and p_skip = 0
    )
    select coalesce(jsonb_agg(public.hold_json(record) order by expires_at), '[]') into v_holds from expired;
    return v_holds;
end $$;

-- Raising a hold.

create type public.raise_item as (
    request_id uuid,
    fixed_nanos numeric,
    output_nanos numeric,
    min_output bigint,
    max_output bigint,
    price_basis jsonb
);
revoke all on type public.raise_item from public, anon, authenticated;
grant usage on type public.raise_item to service_role;

-- Decides anew for a running request, with its own hold as available as it was before. A hold never falls.
create function public.raise_one(p_item public.raise_item, p_locked bigint[]) returns jsonb
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_record public.usage_records;
    v_user public.users;
    v_ask public.admission_item;
    v_available bigint;
    v_budget bigint;
    v_end_user_left bigint;
    v_granted bigint := p_item.max_output;
    v_hold bigint := 0;
begin
    select * into v_record from public.usage_records where request_id = p_item.request_id;
    if not found then
        return jsonb_build_object('outcome', 'unknown');
    elsif v_record.user_id <> all (p_locked) then
        return jsonb_build_object('outcome', 'busy');
    elsif v_record.status <> 'pending' then
        return jsonb_build_object('outcome', 'unknown');
    end if;
    select * into v_user from public.users where id = v_record.user_id;
    if v_record.environment <> 'test' and not v_record.byok then
        v_ask.fixed_nanos := p_item.fixed_nanos;
        v_ask.output_nanos := p_item.output_nanos;
        v_ask.min_output := p_item.min_output;
        v_ask.max_output := p_item.max_output;
        v_ask.markup := v_record.markup;
        v_available := v_user.credits_nanos - v_user.held_nanos + v_record.hold_nanos;
        select k.budget_nanos - u.budget_held_nanos + v_record.hold_nanos
               - case when u.budget_since < public.budget_start(k.budget_window, v_now) then 0 else u.budget_spent_nanos end into v_budget
        from public.api_keys_new k join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = k.id where k.id = v_record.key_id;
        if v_record.has_end_user_budget then
            v_end_user_left := public.end_user_left(v_record.user_id, v_record.end_user, v_now) + v_record.hold_nanos;
        end if;
        v_granted := public.affordable_output(v_ask, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(v_ask, v_user.credits_nanos, v_user.held_nanos - v_record.hold_nanos, v_available, v_budget,
                                           v_end_user_left, v_granted);
        end if;
        v_hold := greatest(v_record.hold_nanos, ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * v_record.markup));
    end if;
    update public.usage_records set hold_nanos = v_hold, output_granted = v_granted, price_basis = coalesce(p_item.price_basis, price_basis)
    where request_id = v_record.request_id;
    if v_hold > v_record.hold_nanos then
        update public.users set held_nanos = held_nanos + v_hold - v_record.hold_nanos where id = v_user.id;
        update public.rate_limit_usage set budget_held_nanos = budget_held_nanos + v_hold - v_record.hold_nanos
        where subject = 'key' and subject_id = v_record.key_id;
        if v_record.has_end_user_budget then
            perform public.hold_for_end_user(v_user.id, v_record.end_user, v_hold - v_record.hold_nanos);
        end if;
    end if;
    return jsonb_build_object('outcome', 'raised', 'granted_output', v_granted, 'hold_nanos', v_hold, 'balance_nanos', v_user.credits_nanos);
end $$;
revoke all on function public.raise_one(public.raise_item, bigint[]) from public, anon, authenticated;
grant execute on function public.raise_one(public.raise_item, bigint[]) to service_role;

create function public.raise_holds(p_items jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_locked bigint[] := public.lock_users(public.settlement_users(p_items));
    v_raw jsonb;
    v_answer jsonb;
    v_answers jsonb[] := '{}';
begin
    for v_raw in select i from jsonb_array_elements(p_items) as i loop
        begin
            v_answer := public.raise_one(jsonb_populate_record(null::public.raise_item, v_raw), v_locked);
        exception when others then
            v_answer := jsonb_build_object('outcome', 'failed', 'sqlstate', sqlstate, 'message', sqlerrm);
        end;
        v_answers := v_answers || (v_answer || jsonb_build_object('request_id', v_raw -> 'request_id'));
    end loop;
    return to_jsonb(v_answers);
end $$;
comment on function public.raise_holds is
    'A larger hold for each item (raise_item), where a request goes out again at another price. Answers carry request_id and outcome: '
    'raised, credits, budget, end_user_budget, unknown (not running), busy or failed.';
revoke all on function public.raise_holds(jsonb) from public, anon, authenticated;
grant execute on function public.raise_holds(jsonb) to service_role;

-- Sums.

-- Settled requests of a range of admission times, in the shape of usage_slots. The upstream's cost is the operator's: what users paid it
-- under their own keys stands in their records alone.
create or replace function public.count_usage(p_user_id bigint, p_from timestamptz, p_until timestamptz) returns setof public.usage_slots
language sql stable set search_path = '' as $$
    select r.user_id, date_bin('15 minutes', r.created_at, '2000-01-01 00:00:00+00'), r.key_id, coalesce(r.model_used, r.model),
           coalesce(r.provider, ''), r.environment, r.endpoint, r.status, coalesce(r.error_code, ''),
           count(*), coalesce(sum(r.prompt_tokens), 0)::bigint, coalesce(sum(r.completion_tokens), 0)::bigint,
           coalesce(sum(r.cached_tokens), 0)::bigint, coalesce(sum(r.reasoning_tokens), 0)::bigint, sum(r.cost_nanos)::bigint,
           coalesce(sum(r.upstream_cost_nanos) filter (where not r.byok), 0)::bigint, sum(r.overrun_nanos)::bigint, coalesce(sum(r.latency_ms), 0)::bigint,
           (count(*) filter (where b.bucket = 0))::int, (count(*) filter (where b.bucket = 1))::int,
           (count(*) filter (where b.bucket = 2))::int, (count(*) filter (where b.bucket = 3))::int,
           (count(*) filter (where b.bucket = 4))::int, (count(*) filter (where b.bucket = 5))::int,
           (count(*) filter (where b.bucket = 6))::int, (count(*) filter (where b.bucket = 7))::int,
           (count(*) filter (where b.bucket = 8))::int, (count(*) filter (where b.bucket = 9))::int,
           (count(*) filter (where b.bucket = 10))::int, (count(*) filter (where b.bucket = 11))::int,
           (count(*) filter (where b.bucket = 12))::int, (count(*) filter (where b.bucket = 13))::int,
           (count(*) filter (where b.bucket = 14))::int, (count(*) filter (where b.bucket = 15))::int,
           (count(*) filter (where b.bucket = 16))::int, (count(*) filter (where b.bucket = 17))::int,
           (count(*) filter (where b.bucket = 18))::int, (count(*) filter (where b.bucket = 19))::int,
           (count(*) filter (where b.bucket = 20))::int, (count(*) filter (where b.bucket = 21))::int,
           (count(*) filter (where b.bucket = 22))::int, (count(*) filter (where b.bucket = 23))::int
    from public.usage_records r, lateral (select width_bucket(coalesce(r.latency_ms, 0), public.latency_bounds()) as bucket) as b
    where (p_user_id is null or r.user_id = p_user_id) and r.created_at >= p_from and r.created_at < p_until and r.status <> 'pending'
    group by 1, 2, 3, 4, 5, 6, 7, 8, 9
$$;

-- Tokens count as far as they are known: embeddings have a prompt and no completion. (greatest() passes over nulls.)
create or replace function public.counted_tokens(p_prompt bigint, p_completion bigint, p_estimate bigint) returns bigint
language sql immutable as $$
    select case when p_prompt is null and p_completion is null then p_estimate
                else least(greatest(coalesce(p_prompt, 0)::numeric + coalesce(p_completion, 0), 0), 1e12)::bigint end
$$;

create or replace function public.schema_version() returns bigint language sql immutable set search_path = '' as $$
    select 20261124110100::bigint
$$;

notify pgrst, 'reload schema';
