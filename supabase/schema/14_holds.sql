-- Holds after admission: raising them while a request runs, and finding those whose time is over. The sweep
-- settles those.

-- Raising a hold
-- --------------

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

-- Decides anew for a running request; its own hold counts as available. A hold never falls.
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
               - case when u.budget_since < public.budget_start(k.budget_window, v_now) then 0
                      else u.budget_spent_nanos end into v_budget
        from public.api_keys_new k join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = k.id
        where k.id = v_record.key_id;
        if v_record.has_end_user_budget then
            v_end_user_left := public.end_user_left(v_record.user_id, v_record.end_user, v_now)
                               + v_record.hold_nanos;
        end if;
        v_granted := public.affordable_output(
            v_ask, greatest(0, least(v_available, v_budget, v_end_user_left)));
        if v_granted < p_item.min_output then
            return public.refuse_for_money(
                v_ask, v_user.credits_nanos, v_user.held_nanos - v_record.hold_nanos, v_available, v_budget,
                v_end_user_left, v_granted);
        end if;
        v_hold := greatest(v_record.hold_nanos,
                           ceil((p_item.fixed_nanos + p_item.output_nanos * v_granted) * v_record.markup));
    end if;
    update public.usage_records set hold_nanos = v_hold, output_granted = v_granted,
        price_basis = coalesce(p_item.price_basis, price_basis)
    where request_id = v_record.request_id;
    if v_hold > v_record.hold_nanos then
        update public.users set held_nanos = held_nanos + v_hold - v_record.hold_nanos where id = v_user.id;
        update public.rate_limit_usage set
            budget_held_nanos = budget_held_nanos + v_hold - v_record.hold_nanos
        where subject = 'key' and subject_id = v_record.key_id;
        if v_record.has_end_user_budget then
            perform public.hold_for_end_user(v_user.id, v_record.end_user, v_hold - v_record.hold_nanos);
        end if;
    end if;
    return jsonb_build_object(
        'outcome', 'raised', 'granted_output', v_granted, 'hold_nanos', v_hold,
        'balance_nanos', v_user.credits_nanos);
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
    'A larger hold for each item (raise_item), where a request goes out again at another price. Answers '
    'carry request_id and outcome: raised, credits, budget, end_user_budget, unknown (not running), busy or '
    'failed.';
revoke all on function public.raise_holds(jsonb) from public, anon, authenticated;
grant execute on function public.raise_holds(jsonb) to service_role;

-- Expired holds
-- -------------

-- A hold for the instance that is to find out what became of its request.
create function public.hold_json(p_record public.usage_records) returns jsonb language plpgsql stable as $$
begin
    return jsonb_build_object(
        'request_id', p_record.request_id, 'generation_id', p_record.generation_id, 'mode', p_record.mode,
        'environment', p_record.environment, 'byok', p_record.byok,
        'provider_key', case when p_record.byok then
            (select k.encrypted_key from public.provider_keys k where k.user_id = p_record.user_id) end);
end $$;
revoke all on function public.hold_json(public.usage_records) from public, anon, authenticated;
grant execute on function public.hold_json(public.usage_records) to service_role;

-- Expired holds, oldest first. The watermark in gateway_state moves along, so that the next sweep starts
-- where holds can still be.
create function public.list_expired_holds(p_limit int, p_skip int default 0) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_now timestamptz := clock_timestamp();
    v_holds jsonb;
begin
    with expired as (
        select r as record, r.expires_at from public.usage_records r
        where r.expires_at >= (select swept_until from public.gateway_state) and r.expires_at <= v_now
          and r.status = 'pending'
        order by r.expires_at limit p_limit offset p_skip
    ), moved as (
        update public.gateway_state set swept_until = m.until
        from (select least(min(expires_at), v_now - interval '1 minute') as until from expired) as m
        where singleton and swept_until < m.until and p_skip = 0
    )
    select coalesce(jsonb_agg(public.hold_json(record) order by expires_at), '[]') into v_holds from expired;
    return v_holds;
end $$;
revoke all on function public.list_expired_holds(int, int) from public, anon, authenticated;
grant execute on function public.list_expired_holds(int, int) to service_role;

-- An expiry that moves to before the watermark takes the watermark along, or the sweep would never see it.
create function public.lower_watermark() returns trigger language plpgsql set search_path = '' as $$
begin
    update public.gateway_state set swept_until = least(swept_until, new.expires_at)
    where singleton and swept_until > new.expires_at;
    return null;
end $$;
revoke all on function public.lower_watermark() from public, anon, authenticated;
grant execute on function public.lower_watermark() to service_role;

create trigger usage_records_expiry_moved after update of expires_at on public.usage_records
    for each row execute function public.lower_watermark();

-- Returns up to four expired holds of a user, and counts slots and held budgets anew from the journal. At
-- most once in ten seconds for each user.
create function public.recount_user(
    p_user_id bigint, p_key_id bigint, p_end_user text, p_now timestamptz
) returns jsonb language plpgsql as $$
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
            budget_held_nanos = coalesce(
                (select sum(hold_nanos) from pending where end_user = p_end_user and has_end_user_budget), 0)
        where u.user_id = p_user_id and u.end_user = p_end_user
    )
    select jsonb_agg(public.hold_json(e.record)) into v_expired
    from (select p::public.usage_records as record from pending p
          where p.expires_at <= p_now order by random() limit 4) as e;
    return v_expired;
end $$;
comment on function public.recount_user is
    'So that a crash leaks neither money nor slots for longer than its hold''s time to live, with no worker '
    'running.';
revoke all on function public.recount_user(bigint, bigint, text, timestamptz)
    from public, anon, authenticated;
grant execute on function public.recount_user(bigint, bigint, text, timestamptz) to service_role;
